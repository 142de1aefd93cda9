"""Resizing with antialiasing as two products with constant matrices: exact in every runtime.

ONNX has the operator (Resize, antialias=1), but OpenVINO ignores the attribute, and ONNX Runtime
computes another function with scale factors and aligned corners. Bilinear and bicubic resizing are
separable and linear, and sizes of images are fixed, so each axis is one matrix: what PyTorch's own
operator makes of the unit vectors.

    Y = R_h X R_w^T,   R_w^T = resize(I, height kept)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.graph.edits import add_tensor, described
from qwt_fx.graph.nodes import argument

aten = torch.ops.aten
ANTIALIASED = (aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec)


def write_out_resizes(gm: GraphModule) -> None:
    """Replace antialiased resizes, in place; shapes must be recorded (`node.meta["val"]`)."""
    call = gm.graph.call_function
    for node in [n for n in gm.graph.nodes if n.target in ANTIALIASED]:
        source = node.args[0]
        assert isinstance(source, Node)  # the operator resizes a value of the graph
        value = source.meta["val"]
        height, width = (int(size) for size in value.shape[2:])
        with gm.graph.inserting_before(node):
            rows = add_tensor(gm, f"{node.name}_rows", _matrix(node, height, 0).T.contiguous())
            columns = add_tensor(gm, f"{node.name}_columns", _matrix(node, width, 1))
            if value.dtype is not torch.float32:
                rows, columns = (call(aten.to.dtype, (m, value.dtype)) for m in (rows, columns))
            new = call(aten.matmul.default, (call(aten.matmul.default, (rows, source)), columns))
        new.meta = described(node)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _matrix(node: Node, size: int, axis: int) -> Tensor:
    """(size, resized) float32 along height (axis 0) or width (1): a row for each unit vector."""
    resize: Callable[..., Tensor] = node.target  # type: ignore[assignment]
    sizes, factors = argument(node, 1, "output_size"), argument(node, 3, "scale_factors")
    corners = argument(node, 2, "align_corners")
    unit = torch.eye(size)[None, None]
    if sizes is None:
        return resize(unit, None, corners, [1.0, factors[axis]])[0, 0]
    return resize(unit, [size, sizes[axis]], corners, None)[0, 0]
