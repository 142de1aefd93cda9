"""int8 weights in the layout that oneDNN's kernels read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

PREPACK = torch.ops.onednn.qlinear_prepack.default


class PackedWeight(nn.Module):
    """Holds int8 codes (out, in) and yields them packed, an opaque (in, out) oneDNN tensor.

    The state is the plain codes, so that copies, `state_dict` and export work; a packed tensor
    supports none of them. Under a compiler the packing is an operator of the graph, which freezing
    computes once; eagerly it is done at the first call.
    """

    codes: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.contiguous())
        self._packed: Tensor | None = None

    def forward(self) -> Tensor:
        """The packed weight."""
        if torch.compiler.is_compiling():
            packed: Tensor = PREPACK(self.codes, None)
            return packed
        if self._packed is None:
            self._packed = PREPACK(self.codes, None)
        return self._packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._packed = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: object) -> None:
        self._packed = None
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_packed": None}
