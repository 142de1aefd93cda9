"""A result as bytes and back, bit for bit: a safetensors file whose header holds the rest as JSON.

What a record may hold: tensors, numbers, texts, `None`, tuples, and the dataclasses of `results`. Their
names are looked up in that list, so nothing a file says is imported, called or unpickled.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qwt_fx.artifact.graph_tensors import permuted_stride
from qwt_fx.artifact.json_values import encode_float, restored
from qwt_fx.errors import ArtifactError
from qwt_fx.measure.sensitivity import Sensitivity
from qwt_fx.numerics.channel_affine import AffineFit
from qwt_fx.numerics.layer_fit import FittedLayer
from qwt_fx.numerics.range_search import Range
from qwt_fx.numerics.regression import Fit
from qwt_fx.numerics.rescale_search import Rescale

_CLASSES: tuple[type[Any], ...] = (AffineFit, Fit, FittedLayer, Range, Rescale, Sensitivity)
RESULTS = {cls.__name__: cls for cls in _CLASSES}

Step = tuple[str, Any]
"""A step's name and its result."""


def settled(value: Any) -> Any:
    """The value as it is after writing and reading: tensors dense, in memory of their own layout.

    Kernels choose by strides, so a result must have the same ones whether it was found or read.
    """
    if isinstance(value, Tensor):
        detached = value.detach()
        dense = detached.is_contiguous() or permuted_stride(detached) is not None
        return detached if dense else detached.contiguous()
    if isinstance(value, tuple):
        return tuple(map(settled, value))
    if type(value).__name__ in RESULTS:
        fields = {f.name: settled(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return type(value)(**fields)
    return value


def encode(steps: Sequence[Step]) -> bytes:
    """Settled results of some steps. Raises `TypeError` for what a record cannot hold."""
    tensors: dict[str, Tensor] = {}
    plain = [[name, _plain(value, tensors)] for name, value in steps]
    return bytes(save(tensors, {"steps": json.dumps(plain, allow_nan=False)}))


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        stride = permuted_stride(value)
        flat = value if stride is None else value.as_strided((value.numel(),), (1,))
        tensors[name] = flat.detach().cpu().clone()
        return {
            "tensor": name,
            "stride": stride,
            "shape": list(value.shape),
            "on": str(value.device),
        }
    if isinstance(value, float):
        return encode_float(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_plain(v, tensors) for v in value]}
    if type(value) is RESULTS.get(type(value).__name__):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {
            "result": type(value).__name__,
            "fields": {k: _plain(v, tensors) for k, v in fields.items()},
        }
    raise TypeError(f"a record cannot hold a {type(value).__name__}")


def decode(data: bytes) -> list[Step]:
    """The steps that `encode` wrote. Raises `ArtifactError` for anything else."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        steps = json.loads(header["__metadata__"]["steps"])
        tensors = load(data)
        return [(str(name), _value(plain, tensors)) for name, plain in steps]
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"not a record of calibration: {error}") from None


def _value(plain: Any, tensors: dict[str, Tensor]) -> Any:
    plain = restored(plain, "record") if isinstance(plain, dict) and "$float" in plain else plain
    if not isinstance(plain, dict):
        return plain
    if "tensor" in plain:
        shape, stride = plain["shape"], plain["stride"]
        # Memory of its own: a file's begins at any byte, and kernels may differ by alignment.
        value = tensors[plain["tensor"]].to(torch.device(plain["on"]), copy=True)
        return value.reshape(shape) if stride is None else value.as_strided(shape, stride)
    if "tuple" in plain:
        return tuple(_value(v, tensors) for v in plain["tuple"])
    return RESULTS[plain["result"]](**{k: _value(v, tensors) for k, v in plain["fields"].items()})
