from __future__ import annotations

import open_clip
import pytest
import torch
from torch import Tensor, nn
from toys import Tower, op_sequence, randomize, tokens

import qwt_fx
from qwt_fx.clip.towers import ImageTower, TextTower
from qwt_fx.errors import CaptureError
from qwt_fx.graph.graph_info import graph_info


@pytest.mark.parametrize("strict", [False, True])
def test_batch_is_dynamic_and_the_function_is_the_models(strict: bool) -> None:
    model = randomize(Tower())
    gm = qwt_fx.capture(model, (tokens(1),), strict=strict)
    for batch in (1, 2, 5, 512):
        x = tokens(batch)
        torch.testing.assert_close(gm(x), model(x), rtol=1e-6, atol=1e-6)
    assert [b.name for b in graph_info(gm).blocks] == ["blocks.0", "blocks.1"]


def test_checks_and_identities_are_removed_and_real_casts_stay() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.dropout(x.to(torch.float32), 0.5, self.training)
            return x.to(torch.float64).float() + 1

    gm = qwt_fx.capture(Model(), (tokens(),))
    assert op_sequence(gm) == ["to", "to", "add"]


def test_no_literal_device_is_left() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = torch.arange(x.shape[0], device=x.device)
            return x[rows, 0] + torch.zeros(x.shape[0], 1) + torch.arange(16.0)

    gm = qwt_fx.capture(Model(), (tokens(),))
    x = tokens(4)
    assert torch.equal(gm(x), Model()(x))
    for node in gm.graph.nodes:
        assert "device" not in node.kwargs
        assert not any(isinstance(a, torch.device) for a in node.args)
    assert gm.to("meta")(x.to("meta")).shape == (4, 16)


def test_training_mode_and_structure_come_back() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(16)

        def forward(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
            return {"out": (self.norm(x[:, 0]), x)}

    model = Model().train()
    gm = qwt_fx.capture(model, (tokens(),))
    assert model.training
    assert model.norm.training
    found = gm(tokens(7))["out"]
    assert isinstance(found, tuple)
    assert found[0].shape == (7, 16)


def test_what_cannot_be_captured_says_why() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match="cannot capture Branch"):
        qwt_fx.capture(Branch(), (tokens(),))
    with pytest.raises(CaptureError, match="wanted a tuple"):
        qwt_fx.capture(Tower(), [tokens()])  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="batch sizes differ"):
        qwt_fx.capture(nn.Bilinear(4, 4, 4), (torch.randn(2, 4), torch.randn(3, 4)))


def test_captured_graph_is_returned_as_it_is() -> None:
    gm = qwt_fx.capture(Tower(), (tokens(),))
    assert qwt_fx.capture(gm, (tokens(),)) is gm


VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 2, "layers": 2}


@pytest.mark.parametrize("kind", ["clip", "siglip", "coca"])
def test_open_clip_towers_of_every_kind(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "clip":
        model: nn.Module = open_clip.CLIP(32, VISION, TEXT)
    elif kind == "siglip":
        text = TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
        model = open_clip.CustomTextCLIP(32, VISION | {"pool_type": "avg"}, text)
    else:
        text = TEXT | {"embed_cls": True, "output_tokens": True, "pad_id": 0}
        pooled = VISION | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        multimodal = {"width": 64, "heads": 2, "layers": 1, "context_length": 16, "vocab_size": 64}
        model = open_clip.CoCa(32, multimodal, text, pooled)
    model.eval()
    towers = ImageTower(model), TextTower(model)
    inputs = torch.randn(2, 3, 32, 32), torch.randint(1, 64, (2, 16))
    for tower, x in zip(towers, inputs, strict=True):
        gm = qwt_fx.capture(tower, (x,))
        torch.testing.assert_close(gm(x), tower(x), rtol=1e-5, atol=1e-5)
        assert len(graph_info(gm).blocks) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14"])
def test_open_clip_models_at_their_real_size(name: str) -> None:
    model = qwt_fx.clip.load(name, allow_random=True)
    for tower, x in (
        (model.image, torch.randn(2, 3, *model.image_size)),
        (model.text, model.text_example(3)),
    ):
        gm = qwt_fx.capture(tower, (x,))
        torch.testing.assert_close(gm(x), tower(x), rtol=1e-4, atol=1e-4)
        assert len(graph_info(gm).blocks) == (24 if "L" in name and x.dim() == 4 else 12)
