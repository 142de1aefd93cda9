"""Runs parts of a graph: one node, some nodes, the way to one value, a graph step by step.

`evaluate` is the one evaluator. `BlockRunner` takes many batches through a graph in steps, so that
each block is computed once: between two steps only the values that later nodes still read are held,
the activations at one block boundary, per batch.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from qwt_fx.batches.batch import Batch, as_inputs
from qwt_fx.batches.value_store import Kept, ValueStore
from qwt_fx.errors import DataError
from qwt_fx.graph.graph_info import recorded_inputs
from qwt_fx.graph.input_check import check_inputs
from qwt_fx.graph.nodes import get_attr

Value: TypeAlias = Any
"""What a node computes: a tensor, a size, a tuple of them. Only the node's operator tells which."""

Env = dict[Node, Value]


def placeholders(gm: GraphModule) -> list[Node]:
    """The graph's inputs, flat, in order."""
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def start(gm: GraphModule, batch: Batch) -> Env:
    """The values of the placeholders for one batch.

    Raises `DataError` for a batch that the graph was not captured for.
    """
    nodes = placeholders(gm)
    flat = gm.graph.process_inputs(*as_inputs(batch))
    try:
        check_inputs(gm, recorded_inputs(gm), flat)
    except DataError as error:
        raise DataError(f"a calibration batch: {error}") from None
    return dict(zip(nodes, flat, strict=True))


def execute(gm: GraphModule, node: Node, env: Env) -> Value:
    """Value of one node; its arguments must be in `env`. Parameters are read where they are used."""

    def value(n: Node) -> Value:
        return get_attr(gm, str(n.target)) if n.op == "get_attr" and n not in env else env[n]

    if node.op == "get_attr":
        return get_attr(gm, str(node.target))
    args = map_arg(node.args, value)
    if node.op == "output":
        return args[0]
    kwargs = map_arg(node.kwargs, value)
    if node.op == "call_function":
        assert callable(node.target)  # call_function nodes hold a callable
        return node.target(*args, **kwargs)
    return get_attr(gm, str(node.target))(*args, **kwargs)


def steps(
    gm: GraphModule, nodes: Iterable[Node], env: Env, keep: Container[Node] = ()
) -> Iterator[Node]:
    """Run nodes in order; yields each before it runs, with what it reads in `env`.

    A value leaves `env` behind the last of the nodes that reads it, unless it is in `keep`.
    """
    nodes = list(nodes)
    last_reader = {read: node for node in nodes for read in node.all_input_nodes}
    for node in nodes:
        yield node
        env[node] = execute(gm, node, env)
        for read in node.all_input_nodes:
            if last_reader[read] is node and read not in keep:
                env.pop(read, None)


def evaluate(gm: GraphModule, nodes: Iterable[Node], env: Env, keep: Container[Node] = ()) -> Env:
    """Run nodes as `steps` does; returns `env`, with what no node read and what is in `keep`."""
    for _ in steps(gm, nodes, env, keep):
        pass
    return env


def computed(gm: GraphModule) -> list[Node]:
    """Every node that runs, in order: not the inputs, nor the parameters."""
    return [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr")]


def nodes_between(gm: GraphModule, known: Container[Node], result: Node) -> list[Node]:
    """What has to run, in order, for the value of `result` where some values are known."""
    pending = [] if result in known else [result]
    needed = set(pending)
    while pending:
        for read in pending.pop().all_input_nodes:
            if (
                read not in needed
                and read not in known
                and read.op not in ("placeholder", "get_attr")
            ):
                needed.add(read)
                pending.append(read)
    return [n for n in gm.graph.nodes if n in needed]


def run_all(
    gm: GraphModule, batch: Batch, visit: Callable[[Node, Env], None] | None = None
) -> Value:
    """Run the whole graph on one batch; `visit(node, env)` is called before each node runs."""
    env = start(gm, batch)
    nodes = computed(gm)
    with torch.no_grad():
        for node in steps(gm, nodes, env):
            if visit is not None:
                visit(node, env)
    return env[nodes[-1]]  # a graph ends in its output


class HeldValues(MutableMapping[Node, Value]):
    """The values of one batch that a runner holds, in its store, and the batch's inputs beside them.

    The inputs are read from the batch whenever they are asked for and are no part of the iteration.
    """

    def __init__(
        self, gm: GraphModule, batches: Sequence[Batch], index: int, store: ValueStore
    ) -> None:
        self._gm, self._batches, self._index, self._store = gm, batches, index, store
        self._inputs = set(placeholders(gm))
        self._kept: dict[Node, Kept] = {}

    def __getitem__(self, node: Node) -> Value:
        if node in self._inputs:
            return start(self._gm, self._batches[self._index])[node]
        return self._kept[node].load()

    def __setitem__(self, node: Node, value: Value) -> None:
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


class _Loaded(dict[Node, Value]):
    """Values during a step: what is held is loaded when it is first read, and goes with the rest."""

    def __init__(self, shared: Env, held: HeldValues) -> None:
        super().__init__(shared)
        self._held = held

    def __missing__(self, node: Node) -> Value:
        value = self[node] = self._held[node]
        return value

    def pop(self, node: Node, default: Value = None) -> Value:
        self._held.discard(node)
        return super().pop(node, default)


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
        self, gm: GraphModule, batches: Sequence[Batch], store: ValueStore | None = None
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
        # What lives on: it goes into what is held once, at the end of the step.
        ran = done.union(shared)
        touched = set(nodes).union(*(n.all_input_nodes for n in nodes))
        lasting = {n for n in touched if n in kept or not ran.issuperset(n.users)}
        for held in self.envs:
            env = evaluate(self.gm, nodes, _Loaded(shared, held), lasting)
            for node in nodes:
                if node in lasting:
                    held[node] = env.pop(node)
            for node in [n for n in held if n not in kept and set(n.users) <= done]:
                del held[node]
        self._done = done

    def revise(self, origin: Node, change: Callable[[Tensor], Tensor]) -> None:
        """Bring the values held up to date where another `origin` is computed from now on.

        change: what became of its value, and so of all that was made of it up to the point reached.
        """
        held_nodes = self.envs[0]
        pending, changed = [origin], {origin}
        while pending:
            for user in pending.pop().users:
                if user in held_nodes and user not in changed:
                    changed.add(user)
                    pending.append(user)
        for held in self.envs:
            for node in changed & set(held):
                held[node] = change(held[node])

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
        wanted = {source for node in nodes for source in node.all_input_nodes}
        read = set(wanted)
        for node in reversed(constants):
            if node in read:
                read.update(node.all_input_nodes)
        return nodes, evaluate(self.gm, [n for n in constants if n in read], {}, wanted)


class Subgraph:
    """The part of a graph between one value and another, as a function of the first.

    Besides the value, the part may read the graph's inputs (sizes, masks made of them).
    """

    def __init__(self, gm: GraphModule, source: Node, result: Node) -> None:
        self.gm, self.source, self.result = gm, source, result
        self._nodes = nodes_between(gm, {source}, result)

    def __call__(self, inputs: Env, value: Tensor) -> Value:
        """Value of the result when `source` is `value` and the placeholders are `inputs`."""
        return evaluate(self.gm, self._nodes, inputs | {self.source: value})[self.result]
