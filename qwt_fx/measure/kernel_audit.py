"""What computes each layer of a lowered graph, an export or a runtime: the kernel audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwt_fx.errors import PreconditionError


@dataclass(frozen=True)
class LayerKernel:
    """One layer of the source model as it runs.

    Attributes:
        name: the layer's name.
        integer: whether its product is computed from integers.
        kernel: the operator or kernel that computes it, as the runtime calls it.
        reason: why it is not computed from integers; `None` when it is.
    """

    name: str
    integer: bool
    kernel: str
    reason: str | None = None


def refuse_if_float(kernels: Sequence[LayerKernel], what: str) -> None:
    """Raise `PreconditionError` when nothing is computed from integers: such a model is not one."""
    if any(kernel.integer for kernel in kernels):
        return
    reasons = sorted({k.reason for k in kernels if k.reason}) or ["it has no layer"]
    raise PreconditionError(
        f"{what}: no layer runs in an integer kernel ({'; '.join(reasons[:3])}), "
        "so it must not be called an integer model"
    )
