"""The rescale that makes a CLIP hard to quantize does not change its function."""

from __future__ import annotations

import pytest
import torch
from open_clip.model import CLIP
from torch import Tensor

from qwt_fx.demo.assets import demo_config, demo_state_dict
from qwt_fx.demo.hard import Strength, harden
from qwt_fx.errors import ConfigError, ModelError


def small_clip() -> CLIP:
    """A CLIP of two image and two text blocks whose norms are not the identity."""
    torch.manual_seed(0)
    model = CLIP(
        embed_dim=32,
        vision_cfg={
            "image_size": 16,
            "patch_size": 8,
            "layers": 2,
            "width": 64,
            "head_width": 32,
        },
        text_cfg={"context_length": 8, "vocab_size": 20, "layers": 2, "width": 32, "heads": 1},
        quick_gelu=True,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def features(model: CLIP, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Image (n, d) and text (n, d) features."""
    with torch.no_grad():
        return model.encode_image(images), model.encode_text(tokens)


def test_features_are_unchanged_in_float64() -> None:
    model = small_clip().double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    tokens = torch.randint(1, 20, (3, 8))
    before = features(model, images, tokens)
    model.load_state_dict(harden(model.state_dict(), seed=1))
    for old, new in zip(before, features(model, images, tokens), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9)


def test_features_of_the_demo_are_unchanged_in_float32() -> None:
    model = CLIP(**demo_config()).eval()
    torch.manual_seed(0)
    height, width = demo_config()["vision_cfg"]["image_size"]
    images = torch.randn(8, 3, height, width)
    tokens = torch.zeros(8, 77, dtype=torch.long)
    tokens[:, :5] = torch.tensor([49406, 320, 736, 2097, 49407])
    model.load_state_dict(demo_state_dict("plain"))
    before = features(model, images, tokens)
    model.load_state_dict(demo_state_dict("hard"))
    for old, new in zip(before, features(model, images, tokens), strict=True):
        assert float((new - old).norm() / old.norm()) <= 1e-4


@pytest.mark.parametrize("tower", ["transformer", "visual.transformer"])
def test_each_block_is_rescaled_in_both_places(tower: str) -> None:
    before = small_clip().state_dict()
    after = harden(before, seed=0)
    for index in range(2):
        block = f"{tower}.resblocks.{index}"
        width = len(before[f"{block}.ln_1.weight"])
        for norm in ("ln_1", "ln_2"):
            ratio = after[f"{block}.{norm}.weight"] / before[f"{block}.{norm}.weight"]
            assert float(ratio.max() / ratio.min()) > 20
        ratio = (after[f"{block}.attn.in_proj_bias"] / before[f"{block}.attn.in_proj_bias"])[
            2 * width :
        ]
        assert float(ratio.max() / ratio.min()) > 20
        columns = after[f"{block}.attn.out_proj.weight"] / before[f"{block}.attn.out_proj.weight"]
        torch.testing.assert_close(columns[0] * ratio, torch.ones(width), rtol=1e-4, atol=0)


def test_what_is_not_rescaled_is_kept_and_the_input_is_not_changed() -> None:
    model = small_clip()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = harden(model.state_dict(), seed=0)
    assert set(after) == set(before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        if "resblocks" not in name or "c_proj" in name or name.endswith("out_proj.bias"):
            assert torch.equal(after[name], before[name])


def test_equal_seeds_give_equal_weights_whatever_the_order_of_names() -> None:
    state = small_clip().state_dict()
    first, other = harden(state, seed=3), harden(state, seed=4)
    again = harden(dict(reversed(state.items())), seed=3)
    assert all(torch.equal(first[name], again[name]) for name in state)
    assert not torch.equal(
        first["transformer.resblocks.0.ln_1.weight"], other["transformer.resblocks.0.ln_1.weight"]
    )


def test_no_strength_changes_nothing() -> None:
    state = small_clip().state_dict()
    nothing = Strength(norm_sigma=0.0, norm_outliers=0.0, value_sigma=0.0, value_outliers=0)
    after = harden(state, seed=0, strength=nothing)
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_only_the_outlier_channels_are_scaled_when_sigma_is_zero() -> None:
    state = small_clip().state_dict()
    after = harden(state, seed=0, strength=Strength(norm_sigma=0.0, value_sigma=0.0))
    norm = "visual.transformer.resblocks.0.ln_1.weight"
    ratio = after[norm] / state[norm]
    assert sorted(ratio.round().tolist()) == [1.0] * 63 + [20.0]
    bias = "visual.transformer.resblocks.0.attn.in_proj_bias"
    ratio = (after[bias] / state[bias])[128:]
    assert sorted(ratio.round().tolist()) == [1.0] * 62 + [8.0] * 2


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no transformer\.resblocks"):
        harden({"blocks.0.norm1.weight": torch.ones(4)}, seed=0)


@pytest.mark.parametrize(
    ("name", "value"), [("norm_sigma", -1.0), ("norm_outliers", 2.0), ("value_factor", 0.0)]
)
def test_a_strength_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        Strength(**{name: value})  # type: ignore[arg-type]
