"""Models at their published depth and width, each at its native image size and at one other.

Among them the image towers of open_clip's PE-Core-B-16, EVA02-B-16, ViT-B-16-SigLIP2-256 and
MobileCLIP2-S2.

Random weights again. Deep ones amplify any error so much that a bar in dB would say nothing; each is
judged by its own sensitivity: what white noise does that is as large as its layers' own errors.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

import qwt_fx
from qwt_fx.config.config import QuantConfig
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import layer_name, weight_layers
from qwt_fx.measure.measure import sqnr_db
from zoo.measure import EVALUATION_SEED, capture, run
from zoo.models import Entry, images, timm_model

SAMPLES = 4
_SIZES = {  # native size first
    "vit_pe_core_base_patch16_224": (224, 256),
    "eva02_base_patch16_clip_224": (224, 256),
    "vit_base_patch16_siglip_256": (256, 224),
    "fastvit_mci2": (256, 224),
    "vit_small_patch16_dinov3": (256, 224),
    "vit_small_patch14_reg4_dinov2": (518, 224),
}
_ANY_SIZE = {"fastvit_mci2"}  # takes no `img_size`

PUBLISHED: tuple[Entry, ...] = tuple(
    Entry(
        f"timm {name} at {size}",
        timm_model(name, **({} if name in _ANY_SIZE else {"img_size": size})),
        images(size),
    )
    for name, sizes in _SIZES.items()
    for size in sizes
)


@dataclass(frozen=True)
class PublishedFigures:
    """One row: 8/8, `repq-vit`; SQNR of the output in dB.

    Attributes:
        quantized: layers in integers, all but what `floating` counts.
        least_layer_db: the worst layer's own error, both sides reading the same values.
        w8a8: of the quantized model, on the images that calibrated it.
        noise: on these, of the floating-point model whose layers' outputs each have white noise of
            the size of the layer's own error.
        unseen: of the quantized model on others; a head behind pooling saw one row an image.
    """

    model: str
    parameters: int
    blocks: int
    quantized: int
    floating: int
    least_layer_db: float
    w8a8: float
    noise: float
    unseen: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def measure_published(entry: Entry, seed: int = 0) -> PublishedFigures:
    """Capture and quantize one model on `SAMPLES` images, evaluate on them and as many others."""
    begun = time.perf_counter()
    gm = capture(entry, seed)
    x, unseen = (entry.inputs(SAMPLES, s) for s in (seed, EVALUATION_SEED + seed))
    q = qwt_fx.quantize(gm, (x,), [x], QuantConfig(8, 8, recipe="repq-vit"))
    exact = run(gm, x)
    own = {name: row["sqnr_db"] for name, row in graph_info(q).layers.items()}
    layers = {layer_name(node) for node in weight_layers(gm)}
    return PublishedFigures(
        model=entry.name,
        parameters=sum(p.numel() for p in gm.parameters()),
        blocks=len(graph_info(gm).blocks),
        quantized=len(layers & own.keys()),
        floating=len(layers - own.keys()),
        least_layer_db=min(own.values()),
        w8a8=sqnr_db(exact, run(q, x)),
        noise=sqnr_db(exact, with_noise(gm, own, x, seed)),
        unseen=sqnr_db(run(gm, unseen), run(q, unseen)),
        seconds=time.perf_counter() - begun,
    )


def with_noise(gm: GraphModule, layers_db: dict[str, float], x: Tensor, seed: int) -> Tensor:
    """The output when each layer's output has white noise, as many dB below it as `layers_db` says."""
    generator = torch.Generator().manual_seed(seed)
    layers = set(weight_layers(gm))

    class Noisy(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            decibels = layers_db.get(layer_name(n)) if n in layers else None
            if decibels is None:
                return value
            noise = torch.randn(value.shape, generator=generator)
            return value + noise * value.square().mean().sqrt() * 10.0 ** (-decibels / 20.0)

    with torch.no_grad():
        output: Tensor = Noisy(gm).run(x)
    return output
