"""`QwTQuantizer`: our bit widths, schemes and static ranges in torchao's PT2E (extra `torchao`).

```
floating = qwt_fx.reparameterize(qwt_fx.capture(model, (x,)), batches, config)
prepared = prepare_pt2e(floating, QwTQuantizer(config))
for x in batches:
    prepared(x)
quantized = convert_pt2e(prepared)
```

What it does not bring, because PT2E knows ranges only: compensation, refits, GPTQ, the log-sqrt2
quantizer. `qwt_fx.quantize` has them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from qwt_fx.capture.attention import decompose_attention, why_not_decomposable
from qwt_fx.config.config import QuantConfig
from qwt_fx.config.settings import settings_of
from qwt_fx.errors import ConfigError, PreconditionError
from qwt_fx.graph.aten import CONVOLUTIONS, MATMULS, SDPA
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import (
    compute_nodes,
    is_constant,
    layer_name,
    tensor_of,
    through_shape_ops,
    weight_layers,
)
from qwt_fx.graph.pass_base import Skip, clean_up
from qwt_fx.numerics.qparams import QuantSpec
from qwt_fx.pt2e.observers import PerChannelRangeObserver, RangeObserver
from qwt_fx.quant.fake_quant import is_fake_quant
from qwt_fx.quant.torch_ao import load_pt2e

__all__ = ["QwTQuantizer"]

_quantizer: Any = load_pt2e().quantizer
_KEY = "quantization_annotation"
_RANGES = ("minmax", "histogram")
_IMAGE_BITS = 8


class QwTQuantizer(_quantizer.Quantizer):  # type: ignore[misc]
    """A torchao `Quantizer` with the bits and schemes of a `QuantConfig`.

    Args:
        config: its bits, overrides, `attention` ("none" or "uniform") and `symmetric_weights` (as the
            recipe says where it is "auto") are used. Weights are quantized per output channel, inputs
            per tensor, all as uint8 codes 0..2^bits - 1.
        ranges: of activations: "minmax", the extremes of all batches, or "histogram", the range with
            the least squared error. Weights take their extremes.

    Attributes:
        skips: what the last `annotate` left in floating point, and why.

    Raises `ConfigError` for what PT2E has no operator for: `compat="original"`, a compensation, a
    log-sqrt2 softmax, `exceptions`.
    """

    def __init__(
        self,
        config: QuantConfig | None = None,
        *,
        ranges: Literal["minmax", "histogram"] = "minmax",
    ) -> None:
        super().__init__()
        self.config = config or QuantConfig()
        self.ranges = ranges
        self.skips: list[Skip] = []
        _check(self.config, ranges)
        self._settings = settings_of(self.config)
        layers = self._settings.layers
        self._symmetric = layers is not None and layers.symmetric_weights
        # Equal specs share one observer where they read one value; a new spec would not be equal.
        self._specs: dict[tuple[Node, int], Any] = {}

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Decompose attention where it is to be quantized."""
        _require_float(model)
        self._specs.clear()
        if self._settings.decompose_attention:
            fused = list(model.graph.find_nodes(op="call_function", target=SDPA))
            for node in (n for n in fused if why_not_decomposable(n) is None):
                decompose_attention(model, node)
            clean_up(model)
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Write each layer's quantizers into `node.meta`; what has none goes into `skips`.

        Raises `ConfigError` for an override that matches no layer.
        """
        _require_float(model)
        layers = list(weight_layers(model))
        names = [layer_name(node) for node in layers]
        if unmatched := self.config.unmatched_overrides(names):
            raise ConfigError(
                f"override {unmatched[0]!r} matches no layer; layers are named like {names[:3]}"
            )
        self.skips = []
        for node in compute_nodes(model):
            reason = self._layer(model, node) if node in layers else self._product(node)
            if reason is not None:
                self.skips.append(Skip(layer_name(node), reason))
        return model

    def validate(self, model: GraphModule) -> None:
        """Raise `PreconditionError` when nothing was annotated."""
        if not any(_KEY in node.meta for node in model.graph.nodes):
            raise PreconditionError(
                f"no layer is quantized: {'; '.join(f'{s.node}: {s.reason}' for s in self.skips[:3])}"
            )

    def _layer(self, gm: GraphModule, node: Node) -> str | None:
        """Annotate a linear or convolution, or say why not."""
        bits = self.config.bits_for(layer_name(node))
        source, weight = node.args[0], node.args[1]
        if not bits.quantized:
            return "left in floating point by the configuration"
        if not isinstance(source, Node) or tensor_of(gm, weight) is None:
            return "its weight is computed, not a parameter"
        if is_constant(source):
            return "its input depends on no input of the model"
        specs: dict[Node, Any] = {}
        if bits.activation is not None and bits.dynamic:
            raise ConfigError(
                f"QwTQuantizer: an override makes {layer_name(node)} dynamic, and PT2E's observers are "
                "static; use qwt_fx.quantize"
            )
        if bits.activation is not None:
            image = node.target in CONVOLUTIONS and through_shape_ops(source).op == "placeholder"
            specs[source] = self._activation(source, _IMAGE_BITS if image else bits.activation)
        if bits.weight is not None:
            assert isinstance(weight, Node)  # tensor_of found its tensor
            specs[weight] = self._weight(bits.weight, layer_name(node))
        _annotate(node, specs)
        return None

    def _product(self, node: Node) -> str | None:
        """Annotate a product of activations, or say why not."""
        bits = self.config.bits_for(layer_name(node)).activation
        if not self._settings.quantize_attention or bits is None:
            return "attention stays in floating point (attention='none')"
        if node.target not in MATMULS:
            return f"{node.target} is not quantized"
        operands = [a for a in node.args[:2] if isinstance(a, Node)]
        if len(operands) < 2 or any(is_constant(a) for a in operands):
            return "a bare matmul with a parameter (final projection), not a linear"
        _annotate(node, {operand: self._activation(operand, bits) for operand in operands})
        return None

    def _activation(self, source: Node, bits: int) -> Any:
        key = (source, bits)
        if key not in self._specs:
            spec = QuantSpec(bits)
            constructor = RangeObserver.with_args(
                spec=spec, layer=source.name, histogram=self.ranges == "histogram"
            )
            self._specs[key] = _spec(spec, torch.per_tensor_affine, constructor)
        return self._specs[key]

    def _weight(self, bits: int, name: str) -> Any:
        spec = QuantSpec(bits, ch_axis=0, symmetric=self._symmetric)
        constructor = PerChannelRangeObserver.with_args(spec=spec, layer=f"{name}.weight")
        return _spec(spec, torch.per_channel_affine, constructor)


def _check(config: QuantConfig, ranges: object) -> None:
    if ranges not in _RANGES:
        raise ConfigError(f"ranges: got {ranges!r}, wanted one of {', '.join(_RANGES)}")
    refused = {
        "compat": config.compat != "none",
        "compensation": config.compensation not in ("auto", "none"),
        "attention": config.attention not in ("none", "uniform"),
        "exceptions": config.exceptions > 0.0,
        "activations": config.activations != "static",
    }
    for name in (n for n, wrong in refused.items() if wrong):
        raise ConfigError(
            f"QwTQuantizer: {name}={getattr(config, name)!r} is nothing that torchao's PT2E can "
            "insert; use qwt_fx.quantize, or leave it at its default"
        )


def _require_float(model: GraphModule) -> None:
    """Overrides need the layers' names, and our quantizers must be gone. Raises `PreconditionError`."""
    graph_info(model)
    if ours := [node.name for node in model.graph.nodes if is_fake_quant(model, node)]:
        raise PreconditionError(
            f"the graph has observers of qwt-fx ({ours[0]}, ...), and torchao inserts its own: run "
            "RemoveObservers()(gm) first, or start from qwt_fx.reparameterize"
        )


def _spec(spec: QuantSpec, scheme: torch.qscheme, constructor: Any) -> Any:
    return _quantizer.QuantizationSpec(
        dtype=torch.uint8,
        quant_min=spec.quant_min,
        quant_max=spec.quant_max,
        qscheme=scheme,
        ch_axis=spec.ch_axis,
        observer_or_fake_quant_ctr=constructor,
    )


def _annotate(node: Node, specs: dict[Node, Any]) -> None:
    node.meta[_KEY] = _quantizer.QuantizationAnnotation(input_qspec_map=specs, _annotated=True)
