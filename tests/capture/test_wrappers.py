"""Models as users wrap them: taken off where that is exact, otherwise named with the way out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx.errors import CaptureError
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import compute_nodes, layer_name


def _layers(model: nn.Module) -> list[str]:
    return [layer_name(node) for node in compute_nodes(qwt_fx.capture(model, (tokens(),)))]


class Adapter(nn.Module):
    """A linear with a low-rank adapter, as PEFT's `lora.Linear` is built."""

    def __init__(self, linear: nn.Linear, merged: bool) -> None:
        super().__init__()
        self.base_layer, self.merged = linear, merged
        self.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, linear.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y if self.merged else y + self.lora_B["default"](self.lora_A["default"](x))


class Adapted(nn.Module):
    """A model with adapters, as PEFT's `PeftModel` is called and unwrapped."""

    def __init__(self, model: nn.Module, merged: bool) -> None:
        super().__init__()
        self.base_model, self.peft_config = copy.deepcopy(model), {"default": object()}
        block: Any = self.base_model.get_submodule("blocks.0")
        block.fc1 = Adapter(block.fc1, merged)

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.compile()
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        AveragedModel,
        lambda model: torch.compile(nn.DataParallel(model)),
        _compiled_in_place,
    ],
    ids=["DataParallel", "compile", "AveragedModel", "both", "compile in place"],
)
def test_wrappers_come_off_and_layers_keep_their_names(wrap: Any) -> None:
    model = randomize(Tower(1))
    wrapped, x = wrap(model), tokens()
    gm = qwt_fx.capture(wrapped, (x,))
    assert torch.equal(gm(x), model(x))
    assert [layer_name(node) for node in compute_nodes(gm)] == _layers(model)
    assert [b.name for b in graph_info(gm).blocks] == ["blocks.0"]


def test_adapters_have_to_be_merged() -> None:
    model, x = randomize(Tower(1)), tokens()
    with pytest.raises(
        CaptureError, match=r"Tower: blocks.0.fc1 is a Adapter.*model.merge_and_unload\(\) first"
    ):
        qwt_fx.capture(Adapted(model, merged=False), (x,))
    gm = qwt_fx.capture(Adapted(model, merged=True), (x,))
    assert torch.equal(gm(x), model(x))


def test_peft_itself() -> None:
    peft = pytest.importorskip("peft")
    model, x = randomize(Tower(1)), tokens()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["fc1"]))
    with pytest.raises(CaptureError, match="merge_and_unload"):
        qwt_fx.capture(adapted, (x,))
    gm = qwt_fx.capture(adapted.merge_and_unload(), (x,))
    torch.testing.assert_close(gm(x), model(x))


class Normalized(nn.Module):
    """Normalizes its images itself, by torchvision's first transform or its function."""

    def __init__(self, function: bool) -> None:
        super().__init__()
        self.normalize = torchvision.transforms.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
        self.embed, self.function = nn.Conv2d(3, 4, 8), function

    def forward(self, image: Tensor) -> Tensor:
        if self.function:
            mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
            return self.embed(torchvision.transforms.functional.normalize(image, mean, std))
        return self.embed(self.normalize(image))


@pytest.mark.parametrize("function", [False, True])
def test_torchvision_normalize_inside_a_model(function: bool) -> None:
    model, image = Normalized(function), torch.rand(3, 3, 16, 16)
    gm = qwt_fx.capture(model, (image,))
    assert torch.equal(gm(image), model(image))
    with pytest.raises(ValueError, match="leading to division by zero"):  # as before, after it
        torchvision.transforms.functional.normalize(image, [0.0], [0.0])


def _hugging_face(part: str, **more: Any) -> nn.Module:
    import transformers

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2, "patch_size": 16, "projection_dim": 16}
    kind = getattr(transformers, f"{part}Model")
    torch.manual_seed(0)
    return kind(kind.config_class(**size, **more)).eval()


def test_flex_attention_names_sdpa() -> None:
    model = _hugging_face("CLIPVision", image_size=32, attn_implementation="flex_attention")
    with pytest.raises(CaptureError, match='attn_implementation="sdpa"'):
        qwt_fx.capture(model, (torch.randn(2, 3, 32, 32),))


def test_naflex_names_the_way_out() -> None:
    """docs/howto/hugging-face.md has it, and is run."""
    model = _hugging_face("Siglip2Vision", num_patches=16)
    inputs = (
        torch.rand(2, 16, 768),
        torch.ones(2, 16, dtype=torch.int64),
        torch.tensor([[4, 4]] * 2),
    )
    with pytest.raises(CaptureError, match=r"spatial_shapes, the shape of each image.*FixedShape"):
        qwt_fx.capture(model, inputs)


def test_texts_and_images_of_other_numbers_name_the_towers() -> None:
    class Both(nn.Module):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            return input_ids.float().mean(1) * pixel_values.mean((1, 2, 3))

    ids, image = torch.ones(3, 8, dtype=torch.int64), torch.rand(3, 3, 8, 8)
    with pytest.raises(
        CaptureError, match=r"'input_ids': 3, 'pixel_values': 1.*CLIPTextModelWithProjection"
    ):
        qwt_fx.capture(Both(), (ids, image[:1]))
    gm = qwt_fx.capture(Both(), (ids, image))
    with pytest.raises(qwt_fx.QwtError, match=r"'input_ids' and 'pixel_values': got sizes 3 and 1"):
        gm(ids, image[:1])
