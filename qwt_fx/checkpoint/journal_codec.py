"""A journal's records as bytes and back, bit for bit: safetensors whose header holds the rest as JSON.

A record is some steps' results: tensors, numbers, texts, `None`, tuples, and the dataclasses of
`RESULTS`. Their names are looked up in that table, so nothing a file says is imported, called or
unpickled.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar, cast, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qwt_fx.artifact.graph_tensors import permuted_stride
from qwt_fx.artifact.json_values import Json, encode_float, restored
from qwt_fx.errors import ArtifactError
from qwt_fx.measure.sensitivity import Sensitivity
from qwt_fx.numerics.channel_affine import AffineFit
from qwt_fx.numerics.layer_fit import FittedLayer
from qwt_fx.numerics.product_search import Balance
from qwt_fx.numerics.range_search import Range
from qwt_fx.numerics.regression import Fit
from qwt_fx.numerics.rescale_search import Rescale

_Found = AffineFit | Balance | Fit | FittedLayer | Range | Rescale | Sensitivity
RESULTS: dict[str, Callable[..., _Found]] = {cls.__name__: cls for cls in get_args(_Found)}

# To a type checker, `float` includes integers and booleans.
Result: TypeAlias = "Tensor | float | str | _Found | tuple[Result, ...] | None"
StepResult = tuple[str, Result]
"""A step's name and its result."""

T = TypeVar("T", bound=Result)


def settled(value: T) -> T:
    """The value as it is after writing and reading: tensors dense, in memory of their own layout.

    Kernels choose by strides, so a result must have the same ones whether it was found or read.
    """
    return cast(T, _settled(value))


def _settled(value: Result) -> Result:
    if isinstance(value, Tensor):
        detached = value.detach()
        dense = detached.is_contiguous() or permuted_stride(detached) is not None
        return detached if dense else detached.contiguous()
    if isinstance(value, tuple):
        return tuple(map(_settled, value))
    if isinstance(value, _Found):
        same = RESULTS[type(value).__name__]
        return same(**{name: _settled(v) for name, v in _fields(value).items()})
    return value


def _fields(value: _Found) -> dict[str, Result]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def encode(steps: Sequence[StepResult]) -> bytes:
    """Settled results of some steps. Raises `TypeError` for what a record cannot hold."""
    tensors: dict[str, Tensor] = {}
    plain = [[name, _plain(value, tensors)] for name, value in steps]
    return bytes(save(tensors, {"steps": json.dumps(plain, allow_nan=False)}))


def _plain(value: Result, tensors: dict[str, Tensor]) -> Json:
    """The value as JSON; its tensors are added to `tensors` under the names that stand for them."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        stride = permuted_stride(value)
        flat = value if stride is None else value.as_strided((value.numel(),), (1,))
        tensors[name] = flat.detach().cpu().clone()
        return {
            "tensor": name,
            "stride": None if stride is None else [*stride],
            "shape": [*value.shape],
            "on": str(value.device),
        }
    if isinstance(value, float):
        return encode_float(value)
    if value is None or isinstance(value, int | str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_plain(v, tensors) for v in value]}
    if isinstance(value, _Found):
        fields: Json = {k: _plain(v, tensors) for k, v in _fields(value).items()}
        return {"result": type(value).__name__, "fields": fields}
    raise TypeError(f"a record cannot hold a {type(value).__name__}")


def decode(data: bytes) -> list[StepResult]:
    """The steps that `encode` wrote. Raises `ArtifactError` for anything else."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        steps = json.loads(header["__metadata__"]["steps"])
        tensors = load(data)
        return [(str(name), _value(plain, tensors)) for name, plain in steps]
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"not a record of calibration: {error}") from None


def _value(plain: Any, tensors: dict[str, Tensor]) -> Result:
    """The inverse of `_plain`; whatever is not as that writes it raises an error of Python's."""
    if not isinstance(plain, dict):
        return cast(Result, plain)
    if "$float" in plain:
        return cast(float, restored(plain, "record"))
    if "tensor" in plain:
        shape, stride = plain["shape"], plain["stride"]
        # Memory of its own: a file's begins at any byte, and kernels may differ by alignment.
        value = tensors[plain["tensor"]].to(torch.device(plain["on"]), copy=True)
        return value.reshape(shape) if stride is None else value.as_strided(shape, stride)
    if "tuple" in plain:
        return tuple(_value(v, tensors) for v in plain["tuple"])
    return RESULTS[plain["result"]](**{k: _value(v, tensors) for k, v in plain["fields"].items()})
