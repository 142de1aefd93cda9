"""Inserts a `FakeQuant` at every activation and weight that the configuration quantizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from torch.fx import GraphModule, Node

from qwt_fx.config.config import QuantConfig
from qwt_fx.config.layer_bits import LayerBits
from qwt_fx.config.settings import Settings, settings_of
from qwt_fx.errors import ConfigError
from qwt_fx.graph.aten import CONVOLUTIONS, MATMULS, RMS_NORM, SDPA, SHAPE_ONLY, SOFTMAXES
from qwt_fx.graph.edits import add_module, described
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import (
    argument,
    compute_nodes,
    is_call,
    is_constant,
    layer_name,
    tensor_of,
    through_shape_ops,
    weight_layers,
)
from qwt_fx.graph.pass_base import Change, Pass, Skip
from qwt_fx.numerics.qparams import QuantSpec
from qwt_fx.quant.fake_quant import FakeQuant
from qwt_fx.quant.norms import NORMS, why_not_reparameterizable

# The input of the patch embedding is an image of 8-bit pixels: fewer bits would lose data that
# cost nothing, and the published code keeps 8 too.
IMAGE_BITS = 8


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Put a `FakeQuant`, switched off, at each quantized input and weight.

    * linear and convolution weights: per output channel;
    * a linear that reads a norm which can be reparameterized: input per channel (RepQ-ViT 3.2);
    * every other linear and convolution: input per tensor, 8 bits where it is the model's input; or, of
      linears whose activations are dynamic, per token, as soon as a norm's channels are dealt with;
    * with `attention` other than "none": q, k, v per tensor and the softmax output, which
      `InsertLogSqrt2Softmax` may have taken already.

    One value read by several layers with the same quantizer gets one `FakeQuant`. Run again, it
    finds every site taken and changes nothing. Raises `ConfigError` for an override that matches
    no layer.
    """

    config: QuantConfig

    @cached_property
    def _settings(self) -> Settings:
        return settings_of(self.config)

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        """See the class."""
        layers = list(weight_layers(gm))
        names = [layer_name(node) for node in layers]
        if unmatched := self.config.unmatched_overrides(names):
            raise ConfigError(
                f"override {unmatched[0]!r} matches no layer; layers are named like {names[:3]}"
            )
        info = graph_info(gm)
        info.config = self.config.to_dict()
        if not self._settings.storable:
            info.unstorable = (
                "compat='original' keeps the published code's non-integer, unclamped zero points, "
                "which no integer type can store; quantize with compat='none'"
            )
        shared: dict[tuple[Node, QuantSpec], Node] = {}
        for node in layers:
            yield from self._layer(gm, node, shared)
        for node in list(compute_nodes(gm)):
            if node not in layers:
                yield from self._matmul(gm, node, shared)

    def _layer(
        self, gm: GraphModule, node: Node, shared: dict[tuple[Node, QuantSpec], Node]
    ) -> Iterator[Change | Skip]:
        name = layer_name(node)
        bits = self.config.bits_for(name)
        if not bits.quantized:
            yield Skip(name, "left in floating point by the configuration")
            return
        source, weight = node.args[0], node.args[1]
        if not isinstance(source, Node) or not isinstance(weight, Node):
            yield Skip(name, "its input or weight is not a tensor of the graph")
            return
        if source.op == "call_module" or weight.op == "call_module":
            return  # taken already
        if is_constant(source):
            yield Skip(name, "its input depends on no input of the model")
            return
        if tensor_of(gm, weight) is None:
            yield Skip(name, "its weight is computed, not a parameter")
            return
        done = []
        if bits.activation is not None:
            spec = self._input_spec(gm, node, source, bits)
            self._insert(gm, node, 0, spec, f"{name}.input", shared)
            done.append(f"input {spec.bits} bits" + (", dynamic" if spec.dynamic else ""))
        if bits.weight is not None:
            spec = self._spec(bits.weight, ch_axis=0)
            self._insert(gm, node, 1, spec, f"{name}.weight", shared)
            done.append(f"weight {spec.bits} bits")
        yield Change(name, ", ".join(done))

    def _spec(
        self,
        bits: int,
        *,
        ch_axis: int | None = None,
        include_zero: bool = True,
        symmetric: bool = False,
    ) -> QuantSpec:
        storable = self._settings.storable
        return QuantSpec(
            bits,
            ch_axis=ch_axis,
            integer_zero_point=storable,
            include_zero=storable and include_zero,
            symmetric=symmetric,
            reserve_zero=storable,
        )

    def _input_spec(self, gm: GraphModule, node: Node, source: Node, layer: LayerBits) -> QuantSpec:
        origin, bits = through_shape_ops(source), layer.activation
        assert bits is not None  # the caller checked
        if node.target in CONVOLUTIONS:
            return self._spec(IMAGE_BITS if origin.op == "placeholder" else bits)
        if is_call(origin, NORMS) and why_not_reparameterizable(gm, origin) is None:
            # Any integer zero point is legal per channel: folding replaces it. An RMSNorm has no bias
            # that could take up the differences between zero points, so it gets the middle one.
            symmetric = origin.target is RMS_NORM
            spec = self._spec(bits, ch_axis=-1, include_zero=False, symmetric=symmetric)
        else:
            spec = self._spec(bits)
        return replace(spec, dynamic=bool(layer.dynamic))

    def _insert(
        self,
        gm: GraphModule,
        node: Node,
        index: int,
        spec: QuantSpec,
        name: str,
        shared: dict[tuple[Node, QuantSpec], Node],
    ) -> None:
        source = node.args[index]
        assert isinstance(source, Node)  # checked by the callers
        key = (source, spec)
        if key not in shared:
            target = add_module(gm, "fake_quant_0", FakeQuant(spec, name))
            # A parameter may be read before the inputs, which come before every operator.
            inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
            after = inputs[-1] if source.op == "get_attr" and source < inputs[-1] else source
            with gm.graph.inserting_after(after):
                call = gm.graph.call_module(target, (source,))
            call.meta = described(source)
            shared[key] = call
        node.update_arg(index, shared[key])

    def _matmul(
        self, gm: GraphModule, node: Node, shared: dict[tuple[Node, QuantSpec], Node]
    ) -> Iterator[Change | Skip]:
        name = layer_name(node)
        bits = self.config.bits_for(name).activation
        if node.target is SDPA:
            if self._settings.quantize_attention:
                yield Skip(name, "is not decomposed: run DecomposeAttention first")
            else:
                yield Skip(name, "attention stays in floating point (attention='none')")
            return
        operands = [a for a in node.args[:2] if isinstance(a, Node)]
        if len(operands) < 2 or node.target not in MATMULS:
            yield Skip(name, f"{node.target} is not quantized")
            return
        if any(is_constant(a) for a in operands):
            yield Skip(name, "a bare matmul with a parameter (final projection), not a linear")
            return
        if not self._settings.quantize_attention or bits is None:
            yield Skip(name, "attention stays in floating point (attention='none')")
            return
        for index, operand in enumerate(operands):
            if operand.op == "call_module" or self._is_log_quantized(operand):
                continue
            which = "probabilities" if self._is_softmax(operand) else f"operand {index}"
            self._insert(gm, node, index, self._spec(bits), f"{name}.{which}", shared)
        yield Change(name, f"operands {bits} bits")

    @staticmethod
    def _is_softmax(node: Node) -> bool:
        return is_call(node, SOFTMAXES)

    @staticmethod
    def _is_log_quantized(node: Node) -> bool:
        while is_call(node, SHAPE_ONLY):
            source = argument(node, 0, "self")
            if not isinstance(source, Node):
                return False
            node = source
        return node.op == "call_module"
