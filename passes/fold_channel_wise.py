"""Channel-wise to layer-wise folding: a per-channel activation quantizer becomes per-layer.

After `ReparameterizeLayerNorm` every channel of a norm's output has the same scale and zero point,
so one of each serves the whole layer (RepQ-ViT section 3.2), and a plain integer GEMM can read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import GraphModule

from qwt_fx.errors import NotCalibratedError
from qwt_fx.graph.pass_base import Change, Pass, Skip
from qwt_fx.quant.fake_quant import fake_quant_of, is_fake_quant


@dataclass(frozen=True)
class FoldChannelWise(Pass):
    """Turn per-channel activation quantizers whose channels agree into per-tensor ones.

    A dynamic one, whose channels' ranges served the reparameterization only, quantizes each token with a
    range of its own from then on, whether its channels agree or not.

    Weight quantizers are left alone: integer GEMMs take one scale per output channel. A quantizer
    whose channels differ is skipped. Run again, it finds nothing left to fold. Raises
    `NotCalibratedError` for a quantizer that has not been observed.
    """

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        """See the class."""
        for node in [n for n in gm.graph.nodes if is_fake_quant(gm, n)]:
            module = fake_quant_of(gm, node)
            if module.spec.ch_axis is None or node.args[0].op == "get_attr":
                continue
            scale, zero_point = module.scale, module.zero_point
            if scale is None or zero_point is None:
                raise NotCalibratedError(
                    f"{module.name} has not been observed: call qwt_fx.observe(gm, batches)"
                )
            if module.spec.dynamic:
                module.spec = module.spec.per_tensor()
                module.reset()
                yield Change(module.name, "a range of each token")
                continue
            if not bool((scale == scale[0]).all() and (zero_point == zero_point[0]).all()):
                yield Skip(module.name, "its channels differ: run ReparameterizeLayerNorm first")
                continue
            module.spec = module.spec.per_tensor()
            module.set_qparams(scale[0], zero_point[0])
            yield Change(module.name, "one scale for the layer")
