"""LayerNorm scale reparameterization (RepQ-ViT, arXiv 2212.08254, section 3.2).

With per-channel scale s and zero point z of a norm's output, one scale for the whole layer
s~ = mean(s), z~ = mean(z), r1 = s / s~, r2 = z - z~:

    gamma' = gamma / r1        beta' = (beta + s r2) / r1
    W' = W diag(r1)            b' = b - W (s r2)          for every linear that reads the norm

leaves the function unchanged and makes every channel's quantizer equal (s~, z~). An RMSNorm has no
beta: its quantizer has z = 2^(b-1) in every channel, so r2 = 0 and beta and b stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.errors import NotCalibratedError
from qwt_fx.graph.aten import LAYER_NORM, RMS_NORM
from qwt_fx.graph.constants import constant_tensor
from qwt_fx.graph.edits import add_module, add_tensor, described
from qwt_fx.graph.nodes import argument, layer_name, strip_weight, tensor_of
from qwt_fx.graph.pass_base import Change, Pass, Skip
from qwt_fx.quant.fake_quant import FakeQuant, fake_quant_of, is_fake_quant
from qwt_fx.quant.norms import (
    NORMS,
    NormReaders,
    norm_affine,
    norm_readers,
    weight_node,
    why_affine_is_fixed,
)


@dataclass(frozen=True)
class ReparameterizeLayerNorm(Pass):
    """Move the differences between a norm's channels into the norm and the linears that read it.

    z~ is round(mean z) clamped to the code range, and r2 follows from it, which is exact for any
    z; with non-integer zero points (`compat="original"`) it is the plain mean. An RMSNorm has no
    shift, so its quantizer is symmetric and r2 = 0. The weights of the linears get new parameters
    (the old ones may be tied elsewhere) and, where they were observed, new ranges. A missing bias
    is added when it is needed. Norms whose output something else reads are skipped.

    Run again, every channel agrees already and nothing changes. Raises `NotCalibratedError` when a
    norm's quantizer has not been observed.
    """

    def requires(self, gm: GraphModule) -> None:
        """Every per-channel quantizer behind a norm must have been observed."""
        super().requires(gm)
        observers = False
        for node in gm.graph.nodes:
            if is_fake_quant(gm, node):
                observers = True
                module = fake_quant_of(gm, node)
                if module.spec.ch_axis == -1 and not module.calibrated:
                    raise NotCalibratedError(
                        f"{module.name} has not been observed: call qwt_fx.observe(gm, batches)"
                    )
        if not observers:
            raise NotCalibratedError(
                "the graph has no observers: run InsertObservers(config)(gm), then "
                "qwt_fx.observe(gm, batches)"
            )

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        """See the class."""
        for norm in [n for n in gm.graph.nodes if n.op == "call_function" and n.target in NORMS]:
            readers = norm_readers(gm, norm)
            name = _name(norm)
            if reason := why_affine_is_fixed(gm, norm) or readers.reason:
                yield Skip(name, reason)
                continue
            modules = [fake_quant_of(gm, n) for n in readers.fake_quants]
            per_channel = [m for m in modules if m.spec.ch_axis is not None]
            if not per_channel or len(per_channel) != len(modules):
                yield Skip(name, "its output is not quantized per channel")
                continue
            if any(n not in _covered(readers) for n in readers.linears):
                yield Skip(name, "one of its linears reads it unquantized")
                continue
            if norm.target is RMS_NORM and not per_channel[0].spec.symmetric:
                yield Skip(name, "an RMSNorm has no shift, and its quantizer is not symmetric")
                continue
            if _agrees(per_channel[0]):
                yield Skip(name, "its channels agree already")
                continue
            yield self._reparameterize(gm, norm, readers, per_channel)

    def _reparameterize(
        self, gm: GraphModule, norm: Node, readers: NormReaders, modules: list[FakeQuant]
    ) -> Change:
        spec = modules[0].spec
        scale, zero_point = modules[0].scale, modules[0].zero_point
        assert scale is not None and zero_point is not None  # requires() checked
        mean_scale, mean_zero = scale.mean(), zero_point.mean()
        if spec.integer_zero_point:
            mean_zero = mean_zero.round().clamp(spec.quant_min, spec.quant_max)
        # (beta + s r2) / r1 = beta / r1 + s~ r2 and W (s r2) = W' (s~ r2): the published code
        # computes the right-hand sides, in the model's precision; so does this.
        r1 = scale / mean_scale
        if spec.symmetric:  # one zero point for all: r2 = 0, and no rounding may make it less so
            shift = torch.zeros_like(scale)
        else:
            shift = (-zero_point * scale) / r1 - (-mean_zero * mean_scale)  # -s~ r2
        _rewrite_norm(gm, norm, r1, shift)
        for linear in readers.linears:
            _rewrite_linear(gm, norm, linear, r1, shift)
        for module in modules:
            module.set_qparams(mean_scale.expand_as(scale), mean_zero.expand_as(zero_point))
        names = ", ".join(layer_name(n) for n in readers.linears)
        return Change(_name(norm), f"moved into {names}; largest r1 {float(r1.max()):.3g}")


def _name(norm: Node) -> str:
    """The norm's name in the source model, noted before its parameters get new names."""
    if "layer" not in norm.meta:
        weight, _ = norm_affine(norm)
        if isinstance(weight, Node) and weight.op == "get_attr":
            norm.meta["layer"] = strip_weight(str(weight.target))
        else:
            norm.meta["layer"] = norm.name
    return layer_name(norm)


def _covered(readers: NormReaders) -> set[Node]:
    """Linears whose input comes through one of the fake_quants."""
    covered: set[Node] = set()
    pending = list(readers.fake_quants)
    while pending:
        for user in pending.pop().users:
            if user in readers.linears:
                covered.add(user)
            else:
                pending.append(user)
    return covered


def _agrees(module: FakeQuant) -> bool:
    scale, zero_point = module.scale, module.zero_point
    if scale is None or zero_point is None:
        return False
    return bool((scale == scale[0]).all() and (zero_point == zero_point[0]).all())


def _rewrite_norm(gm: GraphModule, norm: Node, r1: Tensor, shift: Tensor) -> None:
    weight_arg, bias_arg = norm_affine(norm)
    weight, bias = tensor_of(gm, weight_arg), tensor_of(gm, bias_arg)
    like = weight if weight is not None else bias
    if like is None:
        like = norm.meta["val"]  # no affine at all: the new one has the activations' dtype
    dtype = like.dtype
    ratio, moved = r1.to(dtype), shift.to(dtype)
    gamma = weight if weight is not None else torch.ones_like(ratio)
    beta = bias if bias is not None else torch.zeros_like(ratio)
    base = _name(norm)
    with gm.graph.inserting_before(norm):
        new_weight = add_tensor(gm, f"{base}_weight", (gamma / ratio).detach(), parameter=True)
        new_bias = None
        if norm.target is LAYER_NORM:
            value = (beta / ratio - moved).detach()
            new_bias = add_tensor(gm, f"{base}_bias", value, parameter=True)
    x, shape = norm.args[0], argument(norm, 1, "normalized_shape")
    if norm.target is LAYER_NORM:
        eps = argument(norm, 4, "eps", 1e-5)
        norm.args, norm.kwargs = (x, shape, new_weight, new_bias, eps, False), {}
    else:
        norm.args, norm.kwargs = (x, shape, new_weight, argument(norm, 3, "eps")), {}


def _rewrite_linear(gm: GraphModule, norm: Node, linear: Node, r1: Tensor, shift: Tensor) -> None:
    source = weight_node(gm, linear)
    weight = tensor_of(gm, source)
    assert weight is not None and source is not None  # norm_readers checked
    # BEiT and EVA put the bias of q, k and v together from three tensors: its value counts.
    bias = constant_tensor(gm, argument(linear, 2, "bias"))
    ratio, moved = r1.to(weight.dtype), shift.to(weight.dtype)
    scaled = (weight * ratio).detach()
    base = layer_name(linear)
    new_bias: Node | None = None
    with gm.graph.inserting_before(norm):
        new_weight = add_tensor(gm, f"{base}_weight", scaled, parameter=True)
        if bias is not None or bool((moved != 0).any()):
            total = torch.mm(scaled, moved[:, None])[:, 0]
            total = total if bias is None else bias + total
            new_bias = add_tensor(gm, f"{base}_bias", total, parameter=True)
    old = linear.args[1]
    assert isinstance(old, Node)
    weight_arg = new_weight
    if is_fake_quant(gm, old):
        weight_arg = _requantize(gm, old, linear, new_weight)
    linear.args, linear.kwargs = (linear.args[0], weight_arg, new_bias), {}


def _requantize(gm: GraphModule, old: Node, linear: Node, new_weight: Node) -> Node:
    """A fake_quant on the new weight, observed again if the old one was."""
    before = fake_quant_of(gm, old)
    module = FakeQuant(before.spec, f"{layer_name(linear)}.weight")
    module.mode = before.mode
    if before.calibrated:
        value = tensor_of(gm, new_weight)
        assert value is not None  # made above
        module.observe(value)
    target = add_module(gm, "fake_quant_0", module)
    with gm.graph.inserting_before(linear):
        node = gm.graph.call_module(target, (new_weight,))
    node.meta = described(old)
    return node
