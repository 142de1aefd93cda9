"""Which position of which sample each row of an activation belongs to, and which positions matter.

In a causal text tower pooled at the end-of-text token, later positions cannot influence the
output, so padding must not drive ranges or regressions. That is proved on the graph, batch by
batch, never assumed from a model's name: a *token id* (sample * length + position) is pushed through
the graph in place of every activation. Ops that move elements are run on the ids themselves; ops
that work within a token keep its id; attention keeps the query's id and must be causal. The ids
that reach the output are the positions it reads, and with causality nothing behind the last of
them matters. An op outside these classes ends the proof, and every position counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from qwt_fx.batches.batch import Batch
from qwt_fx.graph.aten import LAYER_NORM, LINEAR, RMS_NORM, SDPA, SOFTMAXES
from qwt_fx.graph.correspondence import Correspondence
from qwt_fx.graph.nodes import argument, get_attr, is_move
from qwt_fx.graph.runner import Env, Value, execute, start
from qwt_fx.graph.sample_ids import run_move
from qwt_fx.text.token_ids import (
    ELEMENTWISE,
    READ_SHAPE,
    SAME_IDS,
    NotProved,
    TokenMask,
    Tokens,
    attend,
    causal_mask,
    follows_first,
    mask_scores,
    row_ids,
    score,
    weigh,
)

aten = torch.ops.aten


def token_mask(gm: GraphModule, batch: Batch, nodes: Iterable[Node]) -> TokenMask:
    """Prove which positions of this batch can influence the output, and mask these nodes' rows.

    A node whose rows mix positions gets no entry. With a reason, no row may be left out.
    """
    try:
        return TokenTracer(gm, batch).trace(set(nodes))
    except NotProved as failure:
        return TokenMask(reason=str(failure))


def token_masks(
    gm: GraphModule, batches: Sequence[Batch], nodes: Collection[Node]
) -> list[TokenMask]:
    """The proof of each batch; equal tensors, which are most of them, are one tensor."""
    proofs: list[TokenMask] = []
    positions: list[Tensor] = []  # of all batches; which rows matter differs between batches
    for batch in batches:
        proof = token_mask(gm, batch, nodes)
        rows: list[Tensor] = []
        proofs.append(
            TokenMask(_shared(proof.rows, rows), _shared(proof.positions, positions), proof.reason)
        )
    return proofs


def _shared(tensors: dict[str, Tensor], known: list[Tensor]) -> dict[str, Tensor]:
    """Each tensor, or an equal one that is known."""
    distinct = {}
    for name, value in tensors.items():
        same = next((k for k in known if torch.equal(k, value)), None)
        if same is None:
            known.append(value)
        distinct[name] = value if same is None else same
    return distinct


class TokenTracer:
    """Pushes token ids through a graph for one batch; every step it cannot follow raises `NotProved`."""

    def __init__(self, gm: GraphModule, batch: Batch) -> None:
        self.gm = gm
        self.env: Env = start(gm, batch)
        integers = [
            n
            for n, v in self.env.items()
            if isinstance(v, Tensor) and not v.is_floating_point() and v.dim() == 2
        ]
        if len(integers) != 1 or len(self.env) != 1:
            raise NotProved("the input is not one tensor of token ids")
        self.source = integers[0]
        self.by_value = {self.source}  # nodes whose value, not only its shape, follows the ids
        self.by_first: set[Node] = set()  # nodes whose value follows the id at position 0 alone
        self.batch, self.length = self.env[self.source].shape
        self.device = self.env[self.source].device

    def trace(self, wanted: set[Node]) -> TokenMask:
        """Push the ids through the graph."""
        ids_of: dict[str, Tensor] = {}
        for node in self.gm.graph.nodes:
            if node.op == "output":
                last = self.last_positions(node)
                break
            if node.op != "placeholder":
                self.env[node] = self._step(node)
            value = self.env[node]
            if node in wanted and isinstance(value, Tokens) and value.columns is None:
                try:
                    ids_of[Correspondence.name_of(node)] = row_ids(value).reshape(-1)
                except NotProved:
                    continue
            elif node in wanted and isinstance(value, Tokens):
                ids_of[Correspondence.name_of(node)] = row_ids(value).reshape(-1)
            self._release(node)
        rows = {
            name: (ids % self.length) <= last[(ids // self.length).long()]
            for name, ids in ids_of.items()
        }
        positions = {name: ids % self.length for name, ids in ids_of.items()}
        return TokenMask(rows=rows, positions=positions)

    def _release(self, node: Node) -> None:
        for source in node.all_input_nodes:
            if isinstance(self.env.get(source), Tokens) and all(
                u in self.env for u in source.users
            ):
                self.env[source] = None

    def read_ids(self, output: Node) -> list[Tensor]:
        """The token id of each row of each output, (rows,)."""
        values = [self.env[node] for node in output.all_input_nodes]
        return [row_ids(value).reshape(-1) for value in values if isinstance(value, Tokens)]

    def last_positions(self, output: Node) -> Tensor:
        """The last position of each sample that the output reads, (batch,)."""
        last = torch.full((self.batch,), -1, dtype=torch.int32, device=self.device)
        for ids in self.read_ids(output):
            samples = (ids // self.length).long()
            last = last.scatter_reduce(0, samples, ids % self.length, "amax")
        if bool((last < 0).any()):
            raise NotProved("the output does not read every sample")
        return last

    def _step(self, node: Node) -> Value:
        if node.op == "get_attr":
            return get_attr(self.gm, str(node.target))
        tracked = [self.env[n] for n in node.all_input_nodes]
        tokens = [t for t in tracked if isinstance(t, Tokens)]
        if node.op == "call_module":
            return tokens[0] if tokens else tracked[0]  # a FakeQuant works element by element
        if node.target is aten.embedding.default and self._is_source(node.args[1]):
            return self._embedding(node)
        by_value = any(n in self.by_value for n in node.all_input_nodes)
        if not tokens:
            if follows_first(node, self.source, self.by_value, self.by_first):
                self.by_first.add(node)
            elif by_value and node.target not in READ_SHAPE:
                self.by_value.add(node)
            return execute(self.gm, node, self.env)
        if any(n in self.by_first for n in node.all_input_nodes):
            by_value = node.target is not aten.where.self
        if by_value and node.target is not aten.index.Tensor:
            raise NotProved(f"{node.name}: the ids' values act on activations beside the embedding")
        return self._token_op(node, tokens)

    def _override(self, node: Node, tokens: Tokens) -> Tokens:
        """A constant in the place of rows of position 0 depends on no later position."""
        mask = self._value(node, 0)
        rows = row_ids(tokens)
        chosen = mask.squeeze(-1).broadcast_to(rows.shape)
        if bool((rows[chosen] % self.length != 0).any()):
            raise NotProved(f"{node.name}: replaces rows behind position 0")
        return tokens

    def _is_source(self, node: Value) -> bool:
        """Whether the node is the input, cast or reshaped to the shape it has."""
        shape = self.env[self.source].shape
        while node.target in SAME_IDS and self.env[node].shape == shape:
            node = node.args[0]
        return node is self.source

    def _value(self, node: Node, index: int) -> Value:
        argument_node = node.args[index]
        return self.env[argument_node] if isinstance(argument_node, Node) else argument_node

    def _embedding(self, node: Node) -> Tokens:
        ids = torch.arange(self.batch * self.length, dtype=torch.int32, device=self.device)
        ids = ids.reshape(self.batch, self.length, 1)
        weight = node.args[0]
        assert isinstance(weight, Node)  # the operator's schema
        return Tokens(ids.expand(-1, -1, self.env[weight].shape[1]))

    def _token_op(self, node: Node, tokens: list[Tokens]) -> Value:
        target = node.target
        if is_move(node):
            return self._move(node)
        if target in ELEMENTWISE:
            return self._elementwise(node, tokens)
        if target in (LAYER_NORM, RMS_NORM):
            ids = row_ids(tokens[0])
            return Tokens(ids[..., None].expand_as(tokens[0].ids))
        if target is LINEAR or (target is aten.matmul.default and len(tokens) == 1):
            return self._project(node, tokens)
        if target is SDPA:
            return self._attention(node)
        if target in (aten.matmul.default, aten.bmm.default):
            return self._matmul(node)
        if target in SOFTMAXES:
            if tokens[0].columns is None or not tokens[0].causal:
                raise NotProved(f"{node.name}: attention is not causal")
            return tokens[0]
        if target is aten.masked_fill.Scalar and tokens[0].columns is not None:
            return mask_scores(tokens[0], ~self._value(node, 1).bool(), self.length)
        if target is aten.where.self and len(tokens) == 1 and self._value(node, 2) is tokens[0]:
            return self._override(node, tokens[0])
        if target is aten.index.Tensor:
            return self.gather(node)
        raise NotProved(f"{node.name}: {target} is not known to keep positions apart")

    def _move(self, node: Node) -> Value:
        inputs = {n: self.env[n] for n in node.all_input_nodes}
        if any(isinstance(v, Tokens) and v.columns is not None for v in inputs.values()):
            raise NotProved(f"{node.name}: attention scores are reshaped")
        if isinstance(self._value(node, 0), list | tuple):  # an element of a split
            return execute(self.gm, node, self.env)
        ids = {n: v.ids if isinstance(v, Tokens) else v for n, v in inputs.items()}
        moved = run_move(node, ids, self.batch)
        if isinstance(moved, list | tuple):
            return [Tokens(m) for m in moved]
        return Tokens(moved)

    def _elementwise(self, node: Node, tokens: list[Tokens]) -> Tokens:
        scores = next((t for t in tokens if t.columns is not None), None)
        if scores is not None:
            inputs = [self.env[n] for n in node.all_input_nodes]
            masks = [o for o in inputs if isinstance(o, Tensor) and o.dim() >= 2]
            if len(tokens) > 1 or (masks and node.target is not aten.add.Tensor):
                raise NotProved(f"{node.name}: combines attention scores")
            return mask_scores(scores, masks[0], self.length) if masks else scores
        ids, *others = aten.broadcast_tensors.default([t.ids for t in tokens])
        if any(not torch.equal(ids, other) for other in others):
            raise NotProved(f"{node.name}: combines different positions")
        return Tokens(ids)

    def _project(self, node: Node, tokens: list[Tokens]) -> Tokens:
        if not isinstance(self._value(node, 0), Tokens):
            raise NotProved(f"{node.name}: a constant is multiplied by an activation")
        weight = self._value(node, 1)
        features = weight.shape[0] if node.target is LINEAR else weight.shape[-1]
        return Tokens(row_ids(tokens[0])[..., None].expand(*tokens[0].ids.shape[:-1], features))

    def _attention(self, node: Node) -> Tokens:
        query, key, value = (self.env[argument(node, i, "")] for i in range(3))
        mask = argument(node, 3, "attn_mask")
        if argument(node, 5, "is_causal", False):
            mask = causal_mask(query, key)
        elif isinstance(mask, Node):
            mask = self.env[mask]
        return attend(query, key, value, mask, self.length, node.name)

    def _matmul(self, node: Node) -> Tokens:
        left, right = self._value(node, 0), self._value(node, 1)
        if left.columns is None:
            return score(left, right, self.length, node.name)
        return weigh(left, right, node.name)

    def gather(self, node: Node) -> Tokens:
        """Rows of an activation chosen by indices."""
        source = self._value(node, 0)
        indices: Value = map_arg(node.args[1], lambda n: self.env[n])
        if not isinstance(source, Tokens) or any(
            i is not None and not isinstance(i, Tensor) for i in indices
        ):
            raise NotProved(f"{node.name}: indexes by an activation")
        return Tokens(aten.index.Tensor(source.ids, list(indices)))
