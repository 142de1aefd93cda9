"""The tensors a graph reads: which are stored, tied, packed; and their registration after a load.

Two tables of the document describe them. `attributes`: the path a node reads -> the stored tensor,
and whether it is a parameter or a buffer. `tensors`: a stored tensor's name -> dtype, shape, the
bits of packed codes, and strides where they are not the usual ones (kernels choose by stride, so
results are bit-identical only if strides are). Tied paths share one stored tensor.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qwt_fx.artifact.graph_args import DTYPES
from qwt_fx.artifact.json_values import Json, shown
from qwt_fx.artifact.packing import MAX_BITS, MIN_BITS, pack, packed_size, unpack
from qwt_fx.errors import ArtifactError
from qwt_fx.graph.nodes import get_attr
from qwt_fx.quant.quantizers import weight_code_bits

_PATH = re.compile(r"(?!__)[A-Za-z0-9_]+(\.(?!__)[A-Za-z0-9_]+)*")
_MAX_PATH, _MAX_RANK, _MAX_ELEMENTS = 500, 16, 1 << 40
_KINDS = ("parameter", "buffer")


@dataclass(frozen=True)
class Attribute:
    """A path of the graph module: the stored tensor behind it and how it is registered."""

    tensor: str
    kind: str
    persistent: bool
    requires_grad: bool


@dataclass(frozen=True)
class Stored:
    """A stored tensor; `bits` of packed codes or `None`; `stride` unless it is contiguous."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    bits: int | None
    stride: tuple[int, ...] | None

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape in the file: packed codes are a vector of bytes."""
        if self.bits is None:
            return self.shape
        return (packed_size(math.prod(self.shape), self.bits),)


# -- writing ---------------------------------------------------------------------------------


def _require_storable(path: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ArtifactError(f"{path}: a {type(value).__name__}, wanted a tensor")
    plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
    if not plain or value.device.type == "meta" or str(value.dtype)[6:] not in DTYPES:
        raise ArtifactError(
            f"{path}: a {type(value).__name__} of {value.dtype}, {value.layout} on {value.device} "
            "cannot be stored: wanted a plain dense tensor of floats, integers or booleans"
        )
    return value


def permuted_stride(value: Tensor) -> list[int] | None:
    """Strides of a dense tensor whose dimensions are stored in another order; else `None`."""
    if value.is_contiguous() or not value.numel():
        return None
    order = sorted(range(value.dim()), key=lambda d: (value.stride(d), value.size(d)))
    step = 1
    for d in order:
        if value.size(d) != 1 and value.stride(d) != step:
            return None
        step *= value.size(d)
    return list(value.stride())


def describe_tensors(gm: GraphModule) -> tuple[dict[str, Json], dict[str, Json]]:
    """The `attributes` and `tensors` tables of the tensors a graph's nodes read.

    Raises `ArtifactError` naming the path of a value that cannot be stored.
    """
    bits = weight_code_bits(gm)
    attributes: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    names: dict[object, str] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        path = str(node.target)
        if path in attributes:
            continue
        try:
            value = _require_storable(path, get_attr(gm, path))
        except AttributeError as error:  # of a graph that a tool took apart, such as convert_pt2e
            raise ArtifactError(f"{path}: read by the graph, but not an attribute of it") from error
        name = names.setdefault(_identity(value), path)
        if name == path:
            tensors[path] = {"dtype": str(value.dtype)[6:], "shape": list(value.shape)}
            if (stride := permuted_stride(value)) is not None:
                tensors[path]["stride"] = stride
        width = bits.get(path, 8)
        if MIN_BITS <= width <= MAX_BITS and _fits(value, width):
            tensors[name]["bits"] = max(width, tensors[name].get("bits", 0))
        attributes[path] = {"tensor": name, **_registration(gm, path, value)}
    return attributes, tensors


def _identity(value: Tensor) -> object:
    """Equal for tied tensors: the same memory read the same way."""
    if not value.numel():
        return id(value)
    return (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)


def _fits(value: Tensor, bits: int) -> bool:
    """Packing must lose nothing, whatever the operators that read the codes promise."""
    return value.dtype is torch.uint8 and (not value.numel() or int(value.max()) < 2**bits)


def _registration(gm: GraphModule, path: str, value: Tensor) -> dict[str, Json]:
    if isinstance(value, nn.Parameter):
        return {"kind": "parameter", "requires_grad": value.requires_grad}
    parent, _, leaf = path.rpartition(".")
    module = gm.get_submodule(parent)
    persistent = leaf in module._buffers and leaf not in module._non_persistent_buffers_set
    return {"kind": "buffer", "persistent": persistent}


def file_tensors(gm: GraphModule, tensors: Mapping[str, Stored]) -> dict[str, Tensor]:
    """What the `.safetensors` file holds: contiguous on CPU, codes packed, no memory shared."""
    held: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, stored in tensors.items():
        value = get_attr(gm, name).detach().cpu()
        if stored.bits is not None:
            held[name] = pack(value, stored.bits)
            continue
        storage = value.untyped_storage()
        whole = value.is_contiguous() and storage.nbytes() == value.nbytes
        own = whole and storage.data_ptr() not in memory
        memory.add(storage.data_ptr())
        held[name] = value if own else value.clone(memory_format=torch.contiguous_format)
    return held


# -- reading ---------------------------------------------------------------------------------


def parse_tensors(table: Json) -> dict[str, Stored]:
    """The `tensors` table, checked. Raises `ArtifactError` naming the tensor."""
    if not isinstance(table, dict):
        raise ArtifactError("tensors: wanted a JSON object")
    stored: dict[str, Stored] = {}
    for name, entry in table.items():
        _require_path(name, "tensors")
        where = f"tensors: {name}"
        if not isinstance(entry, dict) or not {"dtype", "shape"} <= set(entry):
            raise ArtifactError(f"{where}: wanted dtype and shape")
        if unknown := set(entry) - {"dtype", "shape", "bits", "stride"}:
            raise ArtifactError(f"{where}: unknown key {shown(min(unknown))}")
        dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise ArtifactError(f"{where}: the dtype {shown(entry['dtype'])} is not known")
        shape = _sizes(entry["shape"], where)
        stride = _stride(entry["stride"], shape, where) if "stride" in entry else None
        stored[name] = Stored(dtype, shape, _bits(entry, dtype, where), stride)
    return stored


def _bits(entry: Mapping[str, Json], dtype: torch.dtype, where: str) -> int | None:
    if "bits" not in entry:
        return None
    bits = entry["bits"]
    if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS or dtype is not torch.uint8:
        raise ArtifactError(f"{where}: got {shown(bits)} bits of {dtype}, wanted 2..7 of uint8")
    return bits


def _require_path(path: object, where: str) -> None:
    well_formed = isinstance(path, str) and len(path) <= _MAX_PATH and _PATH.fullmatch(path)
    if not well_formed or any(map(keyword.iskeyword, str(path).split("."))):
        raise ArtifactError(f"{where}: {shown(path)} is not a path a tensor may have")


def _sizes(value: Json, where: str) -> tuple[int, ...]:
    sizes = _integers(value)
    if sizes is None or len(sizes) > _MAX_RANK:
        raise ArtifactError(f"{where}: the shape {shown(value)} is malformed")
    if math.prod(sizes) > _MAX_ELEMENTS:
        raise ArtifactError(f"{where}: the shape {shown(value)} is too large")
    return sizes


def _integers(value: Json) -> tuple[int, ...] | None:
    """A list of sizes or strides; `None` for anything else, booleans included."""
    if not isinstance(value, list):
        return None
    integers = tuple(n for n in value if type(n) is int and 0 <= n <= _MAX_ELEMENTS)
    return integers if len(integers) == len(value) else None


def _stride(value: Json, shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    """Only a reordering of a dense tensor's dimensions: anything else could reach other memory."""
    strides = _integers(value)
    if strides is None or len(strides) != len(shape) or 0 in shape:
        raise ArtifactError(f"{where}: the strides {shown(value)} are malformed")
    step = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1 and stride != step:
            raise ArtifactError(f"{where}: the strides {shown(value)} do not fit {list(shape)}")
        step *= size
    return strides


def parse_attributes(table: Json, tensors: Iterable[str]) -> dict[str, Attribute]:
    """The `attributes` table, checked; every stored tensor must be used. Raises `ArtifactError`."""
    if not isinstance(table, dict):
        raise ArtifactError("attributes: wanted a JSON object")
    known, used = set(tensors), set()
    attributes: dict[str, Attribute] = {}
    for path, entry in table.items():
        _require_path(path, "attributes")
        where = f"attributes: {path}"
        if not isinstance(entry, dict) or entry.get("kind") not in _KINDS:
            raise ArtifactError(f"{where}: wanted a kind of {' or '.join(_KINDS)}")
        flag = "requires_grad" if entry["kind"] == "parameter" else "persistent"
        if set(entry) != {"tensor", "kind", flag} or not isinstance(entry[flag], bool):
            raise ArtifactError(f"{where}: wanted tensor, kind and {flag}")
        name = entry["tensor"]
        if not isinstance(name, str) or name not in known:
            raise ArtifactError(f"{where}: the tensor {shown(name)} is not stored")
        used.add(name)
        on = entry[flag] is True
        kind = "parameter" if flag == "requires_grad" else "buffer"
        attributes[path] = Attribute(
            name, kind, persistent=on and kind == "buffer", requires_grad=on and kind != "buffer"
        )
    if left := known - used:
        raise ArtifactError(f"tensors: {min(left)} is used by nothing")
    return attributes


def restore(stored: Stored, value: Tensor, name: str) -> Tensor:
    """A tensor of the file as the graph reads it: unpacked, in its own memory and strides.

    Raises `ArtifactError` for another dtype or shape than recorded.
    """
    dtype = torch.uint8 if stored.bits is not None else stored.dtype
    if value.dtype is not dtype or tuple(value.shape) != stored.file_shape:
        raise ArtifactError(
            f"{name}: got {value.dtype} {list(value.shape)}, "
            f"wanted {dtype} {list(stored.file_shape)}"
        )
    if stored.bits is not None:
        value = unpack(value, stored.bits, stored.shape)
    if stored.stride is None:
        # The file's memory is a map that starts at any byte; kernels may differ by alignment.
        return value.clone(memory_format=torch.contiguous_format)
    return torch.empty_strided(stored.shape, stored.stride, dtype=stored.dtype).copy_(value)


def register(
    gm: GraphModule, attributes: Mapping[str, Attribute], tensors: Mapping[str, Tensor]
) -> None:
    """Register every attribute on a graph module; tied parameters become one object.

    Raises `ArtifactError` for a path that clashes with another or with a method of a module.
    """
    parameters: dict[tuple[str, bool], nn.Parameter] = {}
    for path, attribute in attributes.items():
        module: nn.Module = gm
        *parents, leaf = path.split(".")
        for part in parents:
            if part not in module._modules:
                if hasattr(module, part):
                    raise ArtifactError(f"attributes: {path}: clashes with another name")
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if hasattr(module, leaf):
            raise ArtifactError(f"attributes: {path}: clashes with another name")
        value = tensors[attribute.tensor]
        if attribute.kind == "buffer":
            module.register_buffer(leaf, value, persistent=attribute.persistent)
            continue
        key = (attribute.tensor, attribute.requires_grad)
        if key not in parameters:
            if attribute.requires_grad and not value.is_floating_point():
                raise ArtifactError(f"attributes: {path}: {value.dtype} has no gradient")
            parameters[key] = nn.Parameter(value, requires_grad=attribute.requires_grad)
        module.register_parameter(leaf, parameters[key])
