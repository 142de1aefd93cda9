"""Takes every `FakeQuant` out of a prepared graph: what other passes changed stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import GraphModule

from qwt_fx.graph.pass_base import Change, Pass, Skip
from qwt_fx.quant.fake_quant import fake_quant_of, is_fake_quant


@dataclass(frozen=True)
class RemoveObservers(Pass):
    """Let every reader of a `FakeQuant` read the value itself: the graph computes in floating point.

    The opposite of `InsertObservers`. What happened in between, such as a reparameterization, stays,
    so another toolkit can quantize the result. Run again, it finds nothing.
    """

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        """See the class."""
        for node in [n for n in gm.graph.nodes if is_fake_quant(gm, n)]:
            name = fake_quant_of(gm, node).name
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
            yield Change(name, "removed")
