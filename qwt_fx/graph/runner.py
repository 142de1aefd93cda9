"""Runs a graph in steps over many batches, so that each block is computed once.

Between two steps only the values that later nodes still read are held: the activations at one
block boundary, per batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from qwt_fx.batches.batch import as_inputs
from qwt_fx.batches.value_store import Kept, ValueStore
from qwt_fx.errors import DataError
from qwt_fx.graph.nodes import get_attr

Env = dict[Node, Any]


def placeholders(gm: GraphModule) -> list[Node]:
    """The graph's inputs, flat, in order."""
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def start(gm: GraphModule, batch: Any) -> Env:
    """The values of the placeholders for one batch."""
    nodes = placeholders(gm)
    flat = gm.graph.process_inputs(*as_inputs(batch))
    if len(flat) != len(nodes):
        raise DataError(
            f"a calibration batch has {len(flat)} tensors, the model takes {len(nodes)} "
            f"({', '.join(n.name for n in nodes)})"
        )
    return dict(zip(nodes, flat, strict=True))


def execute(gm: GraphModule, node: Node, env: Env) -> Any:
    """Value of one node; its arguments must be in `env`. Parameters are read where they are used."""

    def value(n: Node) -> Any:
        return env[n] if n in env else get_attr(gm, str(n.target))

    if node.op == "get_attr":
        return get_attr(gm, str(node.target))
    args = map_arg(node.args, value)
    kwargs = map_arg(node.kwargs, value)
    if node.op == "call_function":
        assert callable(node.target)  # call_function nodes hold a callable
        return node.target(*args, **kwargs)
    return get_attr(gm, str(node.target))(*args, **kwargs)


class HeldValues(MutableMapping[Node, Any]):
    """The values of one batch that a runner holds, in its store, and the batch's inputs beside them.

    The inputs are read from the batch whenever they are asked for and are no part of the iteration.
    """

    def __init__(
        self, gm: GraphModule, batches: Sequence[Any], index: int, store: ValueStore
    ) -> None:
        self._gm, self._batches, self._index, self._store = gm, batches, index, store
        self._inputs = set(placeholders(gm))
        self._kept: dict[Node, Kept] = {}

    def __getitem__(self, node: Node) -> Any:
        if node in self._inputs:
            return start(self._gm, self._batches[self._index])[node]
        return self._kept[node].load()

    def __setitem__(self, node: Node, value: Any) -> None:
        if node in self._kept:
            self._kept.pop(node).drop()
        self._kept[node] = self._store.keep(value)

    def __delitem__(self, node: Node) -> None:
        self._kept.pop(node).drop()

    def discard(self, node: Node) -> None:
        """Forget a value, if it is held, without loading it."""
        if node in self._kept:
            del self[node]

    def __contains__(self, node: object) -> bool:
        return node in self._kept or node in self._inputs

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self._kept))

    def __len__(self) -> int:
        return len(self._kept)


class EachBatch(Sequence[Tensor]):
    """One node's value of every batch, loaded when it is asked for."""

    def __init__(self, envs: Sequence[HeldValues], node: Node) -> None:
        self._envs, self._node = envs, node

    def __len__(self) -> int:
        return len(self._envs)

    def __getitem__(self, index: Any) -> Any:
        return self._envs[index][self._node]


class BlockRunner:
    """Advances every batch through a graph, node by node, in step.

    The graph may be rewritten between steps behind the point reached. `store` keeps what is held
    between steps; by default in memory.

    Attributes:
        pinned: nodes whose values are held, once known, for as long as they are in here.
    """

    def __init__(
        self, gm: GraphModule, batches: Sequence[Any], store: ValueStore | None = None
    ) -> None:
        self.gm = gm
        store = store or ValueStore()
        self.envs = [HeldValues(gm, batches, index, store) for index in range(len(batches))]
        self.pinned: set[Node] = set()
        self._done: set[Node] = set(placeholders(gm))

    def advance(self, to: Node, *, keep: Iterable[Node] = ()) -> None:
        """Run every node up to and including `to` for every batch.

        Values that no later node reads are dropped, those in `keep` excepted.
        """
        pending = []
        for node in self.gm.graph.nodes:
            if node not in self._done and node.op not in ("output", "get_attr"):
                pending.append(node)
            if node is to:
                break
        kept = self.pinned | set(keep) | {to}
        nodes, shared = self._same_for_every_batch(pending, kept)
        done = self._done | set(nodes)
        for held in self.envs:
            self._run(nodes, held, kept, shared)
            for node in [n for n in held if n not in kept and set(n.users) <= done]:
                del held[node]
        self._done = done

    def release(self) -> None:
        """Drop everything that is held: the walk is over."""
        for held in self.envs:
            for node in held:
                held.discard(node)

    def _same_for_every_batch(self, pending: list[Node], kept: set[Node]) -> tuple[list[Node], Env]:
        """What each batch has to run, and the values made of parameters alone that it reads.

        Those, quantized weights above all, are computed once a step, and again in the next step that
        reads them. Nodes of later layers may stand anywhere before; held for each batch they would be
        far more than its activations.
        """
        constants: dict[Node, None] = {}
        for node in pending:
            sources = node.all_input_nodes
            made = bool(sources) and all(n.op == "get_attr" or n in constants for n in sources)
            if made and node not in kept:
                constants[node] = None
        nodes = [n for n in pending if n not in constants]
        read = {source for node in nodes for source in node.all_input_nodes}
        for node in reversed(constants):
            if node in read:
                read.update(node.all_input_nodes)
        shared: Env = {}
        for node in constants:
            if node in read:
                shared[node] = execute(self.gm, node, shared)
        return nodes, shared

    def _run(self, nodes: list[Node], held: HeldValues, kept: set[Node], shared: Env) -> None:
        """Run nodes for one batch; what lives on goes into what is held, once, at the end."""
        env = dict(shared)
        ran = self._done | set(shared)
        for node in nodes:
            for source in node.all_input_nodes:
                if source not in env and source in held:
                    env[source] = held[source]
            env[node] = execute(self.gm, node, env)
            ran.add(node)
            for source in node.all_input_nodes:
                if source not in kept and all(user in ran for user in source.users):
                    env.pop(source, None)
                    held.discard(source)
        for node in nodes:
            if node in env and (node in kept or not ran.issuperset(node.users)):
                held[node] = env.pop(node)


class Subgraph:
    """The part of a graph between one value and another, as a function of the first.

    Besides the value, the part may read the graph's inputs (sizes, masks made of them).
    """

    def __init__(self, gm: GraphModule, source: Node, result: Node) -> None:
        self.gm = gm
        self.source = source
        self.result = result
        needed: set[Node] = set()
        pending = [result]
        while pending:
            node = pending.pop()
            if node in needed or node is source or node.op in ("placeholder", "get_attr"):
                continue
            needed.add(node)
            pending += node.all_input_nodes
        self._nodes = [n for n in gm.graph.nodes if n in needed]
        position = {n: i for i, n in enumerate(self._nodes)}
        self._last_use: dict[Node, int] = {}
        for node in self._nodes:
            for read in node.all_input_nodes:
                self._last_use[read] = position[node]

    def __call__(self, inputs: Env, value: Tensor) -> Any:
        """Value of the result when `source` is `value` and the placeholders are `inputs`."""
        env: Env = {n: v for n, v in inputs.items() if n.op == "placeholder"}
        env[self.source] = value
        for index, node in enumerate(self._nodes):
            env[node] = execute(self.gm, node, env)
            for read in node.all_input_nodes:
                if self._last_use.get(read) == index and read is not self.source:
                    env.pop(read, None)
        return env[self.result]


def run_all(gm: GraphModule, batch: Any, visit: Callable[[Node, Env], None] | None = None) -> Any:
    """Run the whole graph on one batch; `visit(node, env)` is called before each node runs."""
    env = start(gm, batch)
    nodes = list(gm.graph.nodes)
    done: set[Node] = set()
    with torch.no_grad():
        for node in nodes:
            if node.op in ("placeholder", "get_attr"):
                done.add(node)
                continue
            if visit is not None:
                visit(node, env)
            if node.op == "output":
                return map_arg(node.args[0], lambda n: env[n])
            env[node] = execute(gm, node, env)
            done.add(node)
            for read in node.all_input_nodes:
                if all(user in done for user in read.users):
                    env.pop(read, None)
    return None
