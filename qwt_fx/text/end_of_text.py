"""Proof that a text tower may be given shorter ids: it is causal, and pooled at one end the ids tell.

The token map proves causality and finds the positions the output reads. They must be, in every
sample of a probe with different ends, exactly what one node says that is made of the ids alone:
`argmax` of the ids, or of the ids that equal an end token. Anything else (a class token, the mean,
the last position) is no proof. That a shorter input means the first positions, and not another
grid of them, is not in the graph's structure: it is tried out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from qwt_fx.batches.batch import Batch
from qwt_fx.graph.nodes import is_call, tensor_of
from qwt_fx.graph.runner import Value
from qwt_fx.text.text_length import run_on_ids
from qwt_fx.text.token_ids import NotProved, Tokens
from qwt_fx.text.token_map import TokenTracer

aten = torch.ops.aten

_SAME = 1e-4  # relative difference that rounding explains ...
_SAME_HALF = 2e-2  # ... and in half precision


def find_end_of_text(gm: GraphModule, model: Callable[..., object], ids: Tensor) -> Node:
    """The node that tells where each text ends, (n,) int64.

    Args:
        gm: the captured graph, which takes ids of any length.
        model: what was captured, to compare with.
        ids: example ids (n, context) int.

    Raises `NotProved` with the reason why positions behind the end may matter.
    """
    with torch.no_grad():
        probe = _probe(gm, ids)
        tracer = _EndTracer(gm, probe)
        tracer.trace(set())
        if tracer.end is None:
            raise NotProved("the output reads a position that no function of the ids alone tells")
        _try_out(gm, model, probe, tracer.end)
    return tracer.end


class _EndTracer(TokenTracer):
    """Remembers by which ids' functions rows were picked, and which of them the output follows."""

    def __init__(self, gm: GraphModule, batch: Batch) -> None:
        super().__init__(gm, batch)
        self.picked_by: list[Node] = []
        self.end: Node | None = None

    def gather(self, node: Node) -> Tokens:
        """See `TokenTracer.gather`."""
        rows = super().gather(node)
        indices: Value = node.args[1]
        self.picked_by += [i for i in indices if i in self.by_value]
        return rows

    def last_positions(self, output: Node) -> Tensor:
        """See `TokenTracer.last_positions`."""
        last = super().last_positions(output)
        for ids in self.read_ids(output):
            if not torch.equal(ids % self.length, last[(ids // self.length).long()]):
                raise NotProved("the output reads more than one position of a text")
        if len(set(last.tolist())) < 2:
            raise NotProved("the output reads the same position of every text")
        for node in self.picked_by:
            if torch.equal(self.env[node].flatten().long(), last.long()):
                self.end = node
        return last


def _probe(gm: GraphModule, ids: Tensor) -> Tensor:
    """Texts (4, context) that end in different places: the example's ids shuffled, and random ones."""
    generator = torch.Generator().manual_seed(0)
    tables = [
        tensor_of(gm, n.args[0]) for n in gm.graph.nodes if is_call(n, {aten.embedding.default})
    ]
    vocabulary = min((len(t) for t in tables if t is not None), default=0)
    if vocabulary == 0:
        raise NotProved("the ids are not looked up in a table")
    length = ids.shape[1]
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(2)])
    shuffled = ids[[0, -1]].cpu().gather(1, order)
    random = torch.randint(0, vocabulary, (2, length), generator=generator, dtype=ids.dtype)
    for token in _compared(gm, vocabulary):  # an end token that the example may lack
        places = torch.randint(0, length, (2, 1), generator=generator)
        random.scatter_(1, places, token)
    return torch.cat([shuffled, random]).to(ids.device)


def _compared(gm: GraphModule, vocabulary: int) -> list[int]:
    """The token ids that the graph compares anything with."""
    tokens = [n.args[1] for n in gm.graph.nodes if is_call(n, {aten.eq.Scalar})]
    return [t for t in tokens if isinstance(t, int) and 0 <= t < vocabulary]


def _try_out(gm: GraphModule, model: Callable[..., object], probe: Tensor, end: Node) -> None:
    """Compare the graph at full length with the model, and at each text's own length with that."""
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in gm.parameters())
    limit = _SAME_HALF if half else _SAME
    whole = _outputs(gm(probe))
    pairs = [("the context", whole, _outputs(model(probe)))]
    for row, last in enumerate(run_on_ids(gm, end, probe).tolist()):
        short = _outputs(gm(probe[row : row + 1, : last + 1]))
        pairs.append((f"{last + 1} ids", short, [w[row : row + 1] for w in whole]))
    for what, ours, theirs in pairs:
        for a, b in zip(ours, theirs, strict=True):
            distance = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
            if not distance <= limit:
                raise NotProved(
                    f"with {what} the graph differs from the whole model by {distance:.1e}"
                )


def _outputs(value: object) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
