"""Which blocks are found in models that are no plain chain of transformer blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys import WIDTH, ConvBlock, Stages, Tower, tokens

import qwt_fx
from qwt_fx.graph.graph_info import Block, graph_info


def blocks(model: nn.Module, x: Tensor) -> list[Block]:
    return graph_info(qwt_fx.capture(model.eval(), (x,))).blocks


IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_blocks_of_convolutions_without_attention_and_norm() -> None:
    found = blocks(Stages(), IMAGE)
    assert [b.name for b in found] == ["stages.0.0", "stages.0.1", "stages.1.1"]
    assert found[0].output == found[1].input  # behind the activation, at the module's end
    assert found[0].output.startswith("relu")


def test_sums_inside_a_module_that_changes_the_shape() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.block = nn.Conv2d(3, 8, 2, 2), ConvBlock(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.down(x))

    (found,) = blocks(nn.ModuleDict({"stages": nn.Sequential(Stage())})["stages"], IMAGE)
    assert (found.name, found.input) == ("0", "conv2d")


class Loop(nn.Module):
    """Sums in the loop of a module around its layers, which stand in a list of lists."""

    def __init__(self, indexed: bool) -> None:
        super().__init__()
        make = (
            nn.ModuleList if indexed else lambda parts: nn.ModuleDict(zip("ab", parts, strict=True))
        )
        self.layers = make(
            [nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16)) for _ in "ab"]
        )
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        for key in range(2) if isinstance(self.layers, nn.ModuleList) else "ab":
            x = x + self.layers[key](self.norm(x))
        return x


@pytest.mark.parametrize("indexed", [True, False])
def test_sums_outside_of_the_modules_of_their_branches(indexed: bool) -> None:
    found = blocks(Loop(indexed), tokens(width=WIDTH))
    assert [b.name for b in found] == (
        ["layers.0", "layers.1"] if indexed else ["layers.a", "layers.b"]
    )
    assert [b.output for b in found] == ["add", "add_1"]


def test_rotary_embeddings_gates_and_single_layers_are_no_blocks() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)])
            self.register_buffer("turn", torch.rand(16))

        def forward(self, x: Tensor) -> Tensor:
            q = self.layers[0](x)
            q = q * self.turn + q.flip(-1) * (1 - self.turn)
            x = self.layers[1](q) * x.sigmoid()
            return x + self.layers[2](x)

    assert blocks(Model(), tokens()) == []


def test_parallel_attentions_are_one_block_and_a_transformer_keeps_its_own() -> None:
    import timm
    from timm.models.vision_transformer import ParallelThingsBlock

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, block_fn=ParallelThingsBlock
    )
    x = torch.randn(2, 3, 32, 32)
    assert [b.name for b in blocks(model, x)] == ["blocks.0", "blocks.1"]
    assert [b.name for b in blocks(Tower(), tokens())] == ["blocks.0", "blocks.1"]
