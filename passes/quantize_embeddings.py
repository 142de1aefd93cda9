"""Stores embedding tables as 8-bit integers: weights only, one symmetric scale a row.

A table is most of a small text tower's size and costs no multiplication, so its rows are gathered as
integers and only what was gathered is dequantized: row_i = s_i q_i, q_i in -127..127.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.errors import ConfigError
from qwt_fx.graph.correspondence import Correspondence
from qwt_fx.graph.edits import add_tensor, described
from qwt_fx.graph.nodes import is_call, layer_name, strip_weight, tensor_of
from qwt_fx.graph.pass_base import Change, Pass, Skip

aten = torch.ops.aten

_LARGEST = 127
_WORTH = 2  # columns: a narrower table, such as one of scales, would grow by its own scales


@dataclass(frozen=True)
class QuantizeEmbeddings(Pass):
    """Replace every embedding lookup in a floating table by one in an int8 table and its scales.

    A table that something else reads too (tied to an output projection) is skipped, because it
    would be stored twice. Run again, no floating table is left. Raises `ConfigError` for a number of
    bits other than 8.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits != 8:
            raise ConfigError(f"QuantizeEmbeddings.bits: got {self.bits}, wanted 8")

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        """See the class."""
        lookups = [n for n in gm.graph.nodes if is_call(n, {aten.embedding.default})]
        readers: dict[str, list[Node]] = {}
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                readers.setdefault(str(node.target), []).extend(node.users)
        for node in lookups:
            table = tensor_of(gm, node.args[0])
            if table is None or not table.is_floating_point():
                continue
            if table.shape[1] < _WORTH:
                continue
            source = node.args[0]
            assert isinstance(source, Node)  # tensor_of found a tensor
            name = strip_weight(str(source.target))
            if any(not is_call(r, {aten.embedding.default}) for r in readers[str(source.target)]):
                yield Skip(name, "something else reads the table")
                continue
            node.meta.setdefault("layer", name)
            _replace(gm, node, source, table.detach())
            yield Change(layer_name(node), "int8 rows")


def quantize_rows(table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (rows, width) int8 and scales (rows, 1) float32 of a floating table (rows, width)."""
    largest = table.float().abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / _LARGEST, torch.ones_like(largest))
    return torch.round(table.float() / scale).to(torch.int8), scale


def _replace(gm: GraphModule, node: Node, source: Node, table: Tensor) -> None:
    codes, scale = quantize_rows(table)
    ids = node.args[1]
    call = gm.graph.call_function
    with gm.graph.inserting_before(node):
        codes_node = add_tensor(gm, f"{source.target}_codes", codes)
        scale_node = add_tensor(gm, f"{source.target}_scale", scale)
        rows = call(aten.embedding.default, (codes_node, ids))
        wide = call(aten.to.dtype, (rows, torch.float32))
        new = call(aten.mul.Tensor, (wide, call(aten.embedding.default, (scale_node, ids))))
        if table.dtype is not torch.float32:
            new = call(aten.to.dtype, (new, table.dtype))
    new.meta = described(node)
    Correspondence.replaced(gm, node, new)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
