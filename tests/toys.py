"""Small modules whose graphs the pass tests look at, and helpers that build those graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import qwt_fx
from qwt_fx.calibrate.observe_ranges import observe
from qwt_fx.config.config import QuantConfig
from qwt_fx.passes import InsertObservers

WIDTH = 16


class Block(nn.Module):
    """A pre-norm transformer block with separate q, k, v (no bias on k) and fused attention."""

    def __init__(self, width: int = WIDTH, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.v = nn.Linear(width, width), nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        heads = [p(n).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)]
        a = nn.functional.scaled_dot_product_attention(*heads, is_causal=self.causal)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Tower(nn.Module):
    """Blocks under an index, behind a norm, as vision towers have them."""

    def __init__(self, layers: int = 2, width: int = WIDTH, causal: bool = False) -> None:
        super().__init__()
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, causal) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return x


class ConvBlock(nn.Module):
    """A convolutional block with batch norms and no attention, as ResNets and RepMixers have them."""

    def __init__(self, width: int, out: int | None = None, stride: int = 1) -> None:
        super().__init__()
        out = out or width
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 1), nn.BatchNorm2d(out)
        changes = out != width or stride != 1
        self.around = nn.Conv2d(width, out, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.around(x)).relu()


class Stages(nn.Module):
    """Stages of convolutional blocks; the first of the second stage changes the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        first, second = [ConvBlock(8), ConvBlock(8)], [ConvBlock(8, 16, 2), ConvBlock(16)]
        self.stages = nn.ModuleList([nn.Sequential(*first), nn.Sequential(*second)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x.mean((2, 3))


class Sequence(nn.Module):
    """A norm and what reads it, given as a function."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.other = nn.Linear(width, width)
        self.matrix = nn.Parameter(torch.randn(width, width))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded weights; norm channel scales that vary by orders of magnitude, biases that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            scale = torch.exp(torch.randn(module.weight.shape, generator=generator))
            module.weight.data = module.weight.data * scale
            module.bias.data = torch.randn(module.bias.shape, generator=generator) * scale
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            for parameter in module.parameters():
                parameter.data.uniform_(-bound, bound, generator=generator)
    return model.eval()


def tokens(batch: int = 3, length: int = 5, width: int = WIDTH, seed: int = 1) -> Tensor:
    """Random activations (batch, length, width)."""
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def observed(model: nn.Module, x: Tensor, config: QuantConfig | None = None) -> GraphModule:
    """The captured graph with observers, observed on one batch."""
    gm = qwt_fx.capture(model, (x,))
    InsertObservers(config or QuantConfig())(gm)
    return observe(gm, [x])


def op_sequence(gm: GraphModule) -> list[str]:
    """Names of the called operators in order, without parameters and sizes."""
    names = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            names.append("fake_quant")
        elif node.op == "call_function" and hasattr(node.target, "overloadpacket"):
            names.append(node.target.overloadpacket.__name__)
    return names
