"""Example inputs: checked against the model before `torch.export` sees them, and given two samples."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import Tensor, nn

from qwt_fx.errors import CaptureError, first_line


def argument_names(
    model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> list[str]:
    """The names that `forward` gives the inputs."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(f"{type(model).__name__}.forward: example_inputs: {error}") from error
    kinds = {p.kind for p in bound.signature.parameters.values() if p.name in bound.arguments}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        extra = [n for n in kwargs if n not in bound.signature.parameters]
        if extra or inspect.Parameter.VAR_POSITIONAL in kinds:
            raise CaptureError(
                f"{type(model).__name__}.forward takes *args or **kwargs for {extra or 'its inputs'}: "
                "wrap it in a module with named inputs"
            )
    return list(bound.arguments)


def batch_size(tensors: Mapping[str, object]) -> int:
    """The first dimension of every tensor given."""
    sizes = {
        name: int(value.shape[0])
        for name, value in tensors.items()
        if isinstance(value, Tensor) and value.dim() > 0
    }
    if not sizes:
        raise CaptureError("example_inputs: no tensor with a batch dimension was given")
    if len(set(sizes.values())) > 1:
        raise CaptureError(
            f"example_inputs: batch sizes differ: {sizes}; give all the same, or capture the image and "
            "the text tower each on its own (of a Hugging Face CLIPModel: "
            "CLIPVisionModelWithProjection and CLIPTextModelWithProjection)"
        )
    return next(iter(sizes.values()))


def with_two_samples(value: object, batch: int) -> object:
    """Export treats sizes 0 and 1 as constants, so a single sample is repeated."""
    if isinstance(value, Tensor) and value.dim() > 0 and batch == 1:
        return value.repeat(2, *([1] * (value.dim() - 1)))
    return value


def require_dtype(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    """Raise `CaptureError` where the model cannot take its inputs' dtype, which export may not notice.

    The model runs once, if the dtype is none of its parameters'.
    """
    held = {str(p.dtype) for p in model.parameters() if p.is_floating_point()}
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    given = {str(t.dtype) for t in tensors if t.is_floating_point()}
    if not held or given <= held:
        return
    try:
        model(*args, **kwargs)
    except RuntimeError as error:
        raise CaptureError(
            f"example_inputs: got {', '.join(sorted(given - held))}, the model's parameters are "
            f"{', '.join(sorted(held))}: convert one to the other with .to ({first_line(error)})"
        ) from error
