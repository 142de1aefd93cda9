"""`FakeQuant`: the module that stands at a quantized tensor until the graph is converted."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qwt_fx.errors import DataError, NotCalibratedError
from qwt_fx.graph.nodes import get_attr
from qwt_fx.numerics.percentile_search import CACHED, search
from qwt_fx.numerics.qparams import LOG_SQRT2, QuantSpec, along_axis
from qwt_fx.quant import operators as ops
from qwt_fx.quant import torch_ao


class Mode(Enum):
    """What a `FakeQuant` does with its input."""

    OFF = "off"  # identity
    OBSERVE = "observe"  # the first call finds the qparams; every call quantizes
    ON = "on"  # quantizes


class FakeQuant(nn.Module):
    """Quantizes and dequantizes a tensor with the very operators that conversion will insert.

    `scale` is () or (channels,) float32 and `zero_point` the same, integer-valued unless
    `spec.integer_zero_point` is false; both are `None` until observed, and always where the quantizer is
    dynamic (`spec.per_token`), which finds those of every row as it runs. `rows`, when set, is a
    boolean mask over all dimensions but the last, flattened: only these rows are observed.

    `token_scale`, float32 powers of two, (length, 1) for an activation (n, length, channels) and
    (length, 1, 1) for (length, n, channels), when set, gives each position a scale of its own beside
    the common one: t Q(x / t). A linear that reads it can multiply its integer result by t instead.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    token_scale: Tensor | None

    def __init__(self, spec: QuantSpec, name: str) -> None:
        super().__init__()
        self.spec = spec
        self.name = name
        self.mode = Mode.OFF
        self.rows: Tensor | None = None
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)
        self.register_buffer("token_scale", None)

    @property
    def calibrated(self) -> bool:
        """Whether the quantizer has a scale, or needs none."""
        return self.spec.per_token or self.scale is not None

    def reset(self) -> None:
        """Forget the qparams: the next observation searches again."""
        self.scale = None
        self.zero_point = None

    def set_qparams(self, scale: Tensor, zero_point: Tensor | None) -> None:
        """Set scale and zero point, () or (channels,)."""
        self.scale = scale.detach().clone()
        self.zero_point = None if zero_point is None else zero_point.detach().clone()

    def observe(self, x: Tensor) -> None:
        """Find the qparams of `x`, if it needs some. Raises `DataError` for NaN or infinite values."""
        if self.rows is not None:
            x = x.reshape(-1, x.shape[-1])[self.rows]
        if x.numel() == 0:
            raise DataError(f"{self.name}: nothing to observe: the tensor is empty")
        extremes = torch.stack(torch.aminmax(x))  # NaN where any value is
        if not bool(torch.isfinite(extremes).all()):
            raise DataError(
                f"{self.name}: NaN or infinite values in the tensor to quantize; "
                "check the weights and the calibration inputs"
            )
        if self.spec.per_token:
            return
        scale, zero_point = search(x, self.spec)
        if not bool(torch.isfinite(scale).all() and (scale > 0).all()):
            raise DataError(
                f"{self.name}: a constant channel has no range, and the published procedure "
                "cannot quantize it; use compat='none'"
            )
        self.set_qparams(scale, zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize `x`, or pass it through, as `mode` says."""
        if self.mode is Mode.OFF:
            return x
        if self.mode is Mode.OBSERVE and self.scale is None:
            self.observe(x)
        return self.fake_quantize(x)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Quantize and dequantize `x` regardless of the mode; the dtype stays, the maths are float32."""
        if self.token_scale is None:
            return self._fake_quantize(x.float()).to(x.dtype)
        # A text may be shorter than the context. Powers of two: both products are exact.
        token_scale = self.token_scale[: x.shape[-self.token_scale.dim()]]
        scaled = x.float() * token_scale.reciprocal()
        return (self._fake_quantize(scaled) * token_scale).to(x.dtype)

    def _fake_quantize(self, x: Tensor) -> Tensor:
        spec, scale = self.spec, self.scale
        if spec.per_token:
            return _round_trip_of_tokens(x, spec)
        if scale is None:
            raise NotCalibratedError(f"{self.name} has no scale: observe or calibrate first")
        result: Tensor
        if spec.scheme == LOG_SQRT2:
            if spec.reserve_zero:
                codes = ops.QUANTIZE_LOG_SQRT2(x, float(scale), spec.bits)
                result = ops.DEQUANTIZE_LOG_SQRT2(codes, float(scale), spec.bits)
            else:
                result = ops.FAKE_QUANTIZE_LOG_SQRT2(x, float(scale), spec.bits)
            return result
        zero_point = self.zero_point
        assert zero_point is not None  # set together with the scale of an affine quantizer
        limits = (spec.quant_min, spec.quant_max)
        if not spec.integer_zero_point:
            along = [along_axis(v, spec.ch_axis, x.dim()) for v in (scale, zero_point)]
            result = ops.FAKE_QUANTIZE_AFFINE(x, *along, *limits)
        elif spec.ch_axis is None:
            per_tensor = (float(scale), int(zero_point), *limits, torch.uint8)
            result = _round_trip_in_parts(x, *per_tensor)
        else:
            axis = spec.ch_axis % x.dim()
            per_channel = (scale, zero_point.to(torch.int64), axis, *limits, torch.uint8)
            codes = torch_ao.QUANTIZE_PER_CHANNEL(x, *per_channel)
            result = torch_ao.DEQUANTIZE_PER_CHANNEL(codes, *per_channel)
        return result

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"{self.name}, {self.spec.scheme}, {self.spec.bits} bits, {self.mode.value}"


def _round_trip(x: Tensor, *qparams: object) -> Tensor:
    """Codes of one scale and back."""
    codes = torch_ao.QUANTIZE_PER_TENSOR(x, *qparams)
    result: Tensor = torch_ao.DEQUANTIZE_PER_TENSOR(codes, *qparams)
    return result


def _round_trip_of_tokens(x: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of each row's own scale and back."""
    qparams = ops.CHOOSE_QPARAMS_PER_TOKEN(x, spec.quant_max)
    limits = (spec.quant_min, spec.quant_max, torch.uint8)
    codes = torch_ao.QUANTIZE_PER_TOKEN(x, *qparams, *limits)
    result: Tensor = torch_ao.DEQUANTIZE_PER_TOKEN(codes, *qparams, *limits, torch.float32)
    return result


def _round_trip_in_parts(x: Tensor, *qparams: object) -> Tensor:
    """The same bits; a large tensor on the CPU in parts, as the two operators are seven of PyTorch's."""
    if x.device.type != "cpu" or x.numel() <= CACHED or not x.is_contiguous():
        return _round_trip(x, *qparams)
    result = torch.empty_like(x)
    parts = (torch.split(flat.view(-1), CACHED) for flat in (x, result))
    for part, target in zip(*parts, strict=True):
        target.copy_(_round_trip(part, *qparams))
    return result


def fake_quant_nodes(gm: GraphModule) -> list[Node]:
    """The graph's `FakeQuant` calls in order."""
    return [n for n in gm.graph.nodes if is_fake_quant(gm, n)]


def set_mode(gm: GraphModule, mode: Mode) -> None:
    """Switch every `FakeQuant` of the graph."""
    for module in gm.modules():
        if isinstance(module, FakeQuant):
            module.mode = mode


def is_fake_quant(gm: GraphModule, node: object) -> bool:
    """Whether the node calls a `FakeQuant`."""
    if not isinstance(node, Node) or node.op != "call_module":
        return False
    return isinstance(get_attr(gm, str(node.target)), FakeQuant)


def fake_quant_of(gm: GraphModule, node: Node) -> FakeQuant:
    """The `FakeQuant` a node calls."""
    module: nn.Module = get_attr(gm, str(node.target))
    assert isinstance(module, FakeQuant)  # callers ask is_fake_quant first
    return module
