"""Both towers compute what open_clip's encode_image and encode_text compute, whatever the source."""

from __future__ import annotations

import copy
import json
import logging
import math
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_clip import CONFIG, small_config, small_model, write_config, write_openai_archive
from torch import Tensor, nn

from qwt_fx.artifact.artifact import write_artifact
from qwt_fx.capture.capture import capture
from qwt_fx.clip import clip
from qwt_fx.clip.clip import ClipModel
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import ArtifactError, ConfigError, ModelError
from qwt_fx.measure.measure import sqnr_db

# Features of two blocks. A rounding to 8 (11) bits of mantissa leaves 6 dB a bit and 5 more; sums
# over a block's dozen rounded steps take back about 20.
HALF_PRECISION_DB = {"bf16": 35.0, "fp16": 53.0}


def saved(folder: Path, model: nn.Module, config: dict[str, Any] | None = None) -> tuple[str, str]:
    """A configuration and a checkpoint in a folder: what --model and --pretrained take."""
    weights = folder / "weights.pt"
    torch.save(model.state_dict(), weights)
    return write_config(folder / "small.json", config), str(weights)


def texts(count: int = 3, context: int = 12) -> Tensor:
    tokens: Tensor = open_clip.SimpleTokenizer(context_length=context)(
        [f"a photo of {k} cats" for k in range(count)]
    )
    return tokens


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 24, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def assert_encodes_like(loaded: ClipModel, model: Any) -> None:
    model.requires_grad_(False)  # attention takes another kernel for weights that want gradients
    assert torch.equal(loaded.image(images()), model.encode_image(images()))
    assert torch.equal(loaded.text(texts()), model.encode_text(texts()))


@torch.no_grad()
def assert_same_features(one: ClipModel, other: ClipModel) -> None:
    torch.testing.assert_close(one.image(images()), other.image(images()))
    torch.testing.assert_close(one.text(texts()), other.text(texts()))


@pytest.mark.parametrize("custom", [False, True])
def test_features_and_names_are_the_source_models(custom: bool, tmp_path: Path) -> None:
    config = small_config(custom_text=custom)
    model = small_model(config)
    loaded = clip.load(*saved(tmp_path, model, config))
    assert_encodes_like(loaded, model)
    names = {name for name, _ in model.named_parameters()} - {"logit_scale"}
    image = {name for name, _ in loaded.image.named_parameters()}
    text = {name for name, _ in loaded.text.named_parameters()}
    assert image == {name for name in names if name.startswith("visual.")}
    assert text == names - image
    assert not any(p.requires_grad for p in (*loaded.image.parameters(), *loaded.text.parameters()))
    assert not any(m.training for m in (*loaded.image.modules(), *loaded.text.modules()))


def test_what_a_loaded_model_says_of_itself(tmp_path: Path) -> None:
    config, weights = saved(tmp_path, small_model())
    loaded = clip.load(Path(config), Path(weights))
    assert (loaded.name, loaded.pretrained) == ("small", weights)
    assert loaded.model_config == CONFIG
    assert loaded.image_size == (16, 24)
    assert loaded.context_length == 12
    assert loaded.logit_scale == pytest.approx(20.0855, abs=1e-4)
    assert torch.equal(loaded.tokenizer(["a photo of 0 cats"]), texts(1))
    assert loaded.image_example(2).shape == (2, 3, 16, 24)
    tokens = loaded.text_example(9)
    assert (tokens.shape, tokens.dtype) == ((9, 12), torch.int64)
    assert tokens.amax(dim=1).tolist() == [12, 11, 10, 9, 8, 7, 6, 6, 6]
    for name, tower in loaded.towers.items():
        assert tower is {"image": loaded.image, "text": loaded.text}[name]
    assert torch.equal(loaded.example("text", 9), tokens)
    assert torch.equal(loaded.example("image"), loaded.image_example(1))


@pytest.mark.parametrize("custom", [False, True])
@torch.no_grad()
def test_towers_copy_move_and_restore_like_any_module(custom: bool) -> None:
    torch.manual_seed(0)
    model = small_model(small_config(custom_text=custom))
    for tower, example, reference in (
        (clip.ImageTower(model), images(), model.encode_image),
        (clip.TextTower(model), texts(), model.encode_text),
    ):
        expected = reference(example)
        twin = copy.deepcopy(tower)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(tower(example), expected)  # the copy shares nothing
        twin.load_state_dict(tower.state_dict())
        assert torch.equal(twin(example), expected)
        assert not tower.state_dict().keys() - model.state_dict().keys()
        double = twin.double()(example)
        assert double.dtype == torch.float64
        torch.testing.assert_close(double.float(), expected, rtol=1e-4, atol=1e-5)
        half = twin.to(torch.bfloat16)(example)
        assert half.dtype == torch.float32
        assert sqnr_db(expected, half) > HALF_PRECISION_DB["bf16"]


@torch.no_grad()
def test_towers_can_be_exported(tmp_path: Path) -> None:
    loaded = clip.load(*saved(tmp_path, small_model()))
    for tower, example in ((loaded.image, images()), (loaded.text, texts())):
        exported = torch.export.export(copy.deepcopy(tower), (example,), strict=False)
        torch.testing.assert_close(exported.module()(example), tower(example))
        assert set(dict(exported.named_parameters())) == set(dict(tower.named_parameters()))


@torch.no_grad()
def test_coca_features_are_not_normalized() -> None:
    torch.manual_seed(0)
    config = small_config(
        vision_cfg={"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        text_cfg={"embed_cls": True, "output_tokens": True},
        multimodal_cfg={"context_length": 12, "width": 16, "heads": 2, "layers": 1},
    )
    model = open_clip.CoCa(**config).eval()
    image, text = clip.ImageTower(model), clip.TextTower(model)
    assert torch.equal(image(images()), model.encode_image(images(), normalize=False))
    assert torch.equal(text(texts()), model.encode_text(texts(), normalize=False))
    assert not any("decoder" in name for name in text.state_dict())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@torch.no_grad()
def test_half_precision_towers_take_and_give_float32(precision: str, tmp_path: Path) -> None:
    model = small_model()
    loaded = clip.load(*saved(tmp_path, model), precision=precision)
    assert {p.dtype for p in loaded.text.parameters()} == {clip.PRECISIONS[precision]}
    for features, expected in (
        (loaded.image(loaded.image_example(3)), model.encode_image(loaded.image_example(3))),
        (loaded.text(texts()), model.encode_text(texts())),
    ):
        assert features.dtype == torch.float32
        assert HALF_PRECISION_DB[precision] < sqnr_db(expected, features) < math.inf


# --- sources


def test_openais_spelling_and_random_weights_only_when_asked_for() -> None:
    with pytest.raises(ModelError) as info:
        clip.load("ViT-B/32")
    message = str(info.value)
    assert message.startswith("ViT-B-32: no weights; give --pretrained TAG or FILE (")
    assert "; tags: openai, " in message
    loaded = clip.load("ViT-B/32", allow_random=True)
    assert (loaded.name, loaded.pretrained, loaded.image_size) == ("ViT-B-32", None, (224, 224))
    assert loaded.tokenizer(["a cat"]).shape == (1, 77)


def test_openais_archive_runs_with_quickgelu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model(small_config(quick_gelu=True))
    weights = write_openai_archive(tmp_path / "ViT-B-32.pt", model)
    loaded = clip.load(write_config(tmp_path / "small.json"), weights)
    assert_encodes_like(loaded, model)
    assert loaded.model_config == CONFIG | {"quick_gelu": True}
    assert "these weights were trained with QuickGELU" in caplog.text


def test_a_tags_quickgelu_and_preprocessing_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model(small_config(quick_gelu=True))
    _, weights = saved(tmp_path, model)
    tag = {"url": "unused", "quick_gelu": True, "mean": (0.5, 0.5, 0.5), "resize_mode": "squash"}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: small_config())
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag_name: tag)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: weights)
    loaded = clip.load("ViT-B/32", "openai")
    assert_encodes_like(loaded, model)
    assert (loaded.name, loaded.pretrained) == ("ViT-B-32", "openai")
    assert loaded.preprocess["mean"] == (0.5, 0.5, 0.5)
    assert loaded.preprocess["resize_mode"] == "squash"
    assert "QuickGELU" in caplog.text


def test_local_folders_bring_their_weights_and_preprocessing(tmp_path: Path) -> None:
    model, folder = small_model(), tmp_path / "tiny"
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    document = {"model_cfg": CONFIG, "preprocess_cfg": {"interpolation": "bilinear"}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    loaded = clip.load(f"local-dir:{folder}")
    assert_encodes_like(loaded, model)
    assert loaded.name == "tiny"
    assert loaded.preprocess["interpolation"] == "bilinear"
    with pytest.raises(ModelError, match="brings its own weights: leave --pretrained openai out"):
        clip.load(f"local-dir:{folder}", "openai")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights; wanted one of open_clip_model\.safetensors"):
        clip.load(f"local-dir:{folder}")


def test_open_clips_registry_is_left_alone(tmp_path: Path) -> None:
    before = open_clip.list_models(), open_clip.get_model_config("ViT-B-32")
    clip.load(*saved(tmp_path, small_model()))
    clip.load("ViT-B-32", allow_random=True)
    assert (open_clip.list_models(), open_clip.get_model_config("ViT-B-32")) == before


# --- preprocessing


@pytest.mark.parametrize("given", [None, {"mean": [0.5] * 3, "std": [0.5] * 3, "size": 99}])
def test_the_transform_is_open_clips(given: dict[str, Any] | None, tmp_path: Path) -> None:
    config = CONFIG if given is None else CONFIG | {"preprocess_cfg": given}
    loaded = clip.load(write_config(tmp_path / "small.json", config), allow_random=True)
    expected = open_clip.image_transform(
        (16, 24),
        is_train=False,
        mean=None if given is None else (0.5,) * 3,
        std=None if given is None else (0.5,) * 3,
    )
    pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(1))
    image = Image.fromarray(pixels.to(torch.uint8).numpy())
    tensor = loaded.transform(image)
    assert (tensor.shape, tensor.dtype) == ((3, 16, 24), torch.float32)
    assert torch.equal(tensor, expected(image))
    assert "preprocess_cfg" not in loaded.model_config


# --- artifacts


def stored(model: ClipModel) -> Any:
    """What reading an artifact gives, JSON and all, with the towers as they are."""
    extra = json.loads(json.dumps(clip.to_extra(model)))
    towers = {"image": model.image, "text": model.text}
    return SimpleNamespace(towers=towers, config={}, extra=extra)


def test_an_artifact_needs_neither_checkpoint_nor_network(tmp_path: Path) -> None:
    model = small_model()
    config, weights = saved(tmp_path, model, CONFIG | {"preprocess_cfg": {"resize_mode": "squash"}})
    loaded = clip.load(config, weights)
    artifact = stored(loaded)
    for file in tmp_path.iterdir():
        file.unlink()
    again = clip.from_artifact(artifact)
    assert_encodes_like(again, model)
    for name in ("name", "pretrained", "logit_scale", "model_config", "image_size"):
        assert getattr(again, name) == getattr(loaded, name)
    image = Image.new("RGB", (31, 57), (200, 100, 50))
    assert torch.equal(again.transform(image), loaded.transform(image))
    assert torch.equal(again.tokenizer(["a cat"]), loaded.tokenizer(["a cat"]))


@torch.no_grad()
def test_a_written_artifact_loads_in_the_place_of_a_model(tmp_path: Path) -> None:
    loaded = clip.load(*saved(tmp_path, small_model()))
    towers = {
        "image": capture(loaded.image, (loaded.image_example(2),)),
        "text": capture(loaded.text, (loaded.text_example(2),)),
    }
    folder = tmp_path / "out"
    folder.mkdir()
    write_artifact(folder, towers, config=QuantConfig().to_dict(), extra=clip.to_extra(loaded))
    again = clip.load(folder)
    assert torch.equal(again.image(images()), towers["image"](images()))
    assert torch.equal(again.text(texts()), towers["text"](texts()))
    assert_same_features(again, loaded)


def test_an_artifact_directory_is_loaded_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = clip.load(write_config(tmp_path / "small.json"), allow_random=True)
    (tmp_path / "artifact.json").write_text("{}")
    monkeypatch.setattr(clip, "read_artifact", lambda directory: stored(loaded))
    assert clip.load(tmp_path).name == "small"
    with pytest.raises(ModelError, match="holds its weights: leave 'openai' out"):
        clip.load(tmp_path, "openai")


def test_other_artifacts_are_refused(tmp_path: Path) -> None:
    loaded = clip.load(write_config(tmp_path / "small.json"), allow_random=True)
    artifact = stored(loaded)
    artifact.extra["clip"]["logit_scale"] = "high"
    with pytest.raises(ArtifactError, match=r"extra\.clip\.logit_scale: got 'high'"):
        clip.from_artifact(artifact)
    artifact = stored(loaded)
    artifact.extra["clip"]["preprocess"]["mode"] = "L"
    with pytest.raises(ArtifactError, match=r"artifact\.json: extra\.clip: "):
        clip.from_artifact(artifact)
    with pytest.raises(ArtifactError, match=r"holds a graph, .* use qwt_fx\.load"):
        clip.from_artifact(SimpleNamespace(towers={"model": nn.Identity()}, extra={}))  # type: ignore[arg-type]


# --- refusals


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ModelError) as info:
        clip.load(*arguments, **options)
    message = str(info.value)
    assert "\n" not in message
    return message


def test_unknown_models_come_with_close_matches() -> None:
    assert refusal("ViT-B-23", "openai").startswith("unknown model 'ViT-B-23': did you mean ViT-B-")
    assert "names are known" in refusal("?")


def test_a_directory_that_is_no_artifact_is_named_so(tmp_path: Path) -> None:
    assert "a folder, but no artifact of qwt-fx (no artifact.json in it)" in refusal(tmp_path)


def test_missing_weights_are_named_with_the_models_tags(tmp_path: Path) -> None:
    message = refusal("ViT-B-32", "opena1")
    assert message.startswith(
        "weights 'opena1' of ViT-B-32: no such file or folder, and no tag; tags: openai,"
    )
    config = write_config(tmp_path / "small.json")
    missing = refusal(config, tmp_path / "no.pt")
    assert missing.endswith("of small: no such file or folder, and no tag")
    (tmp_path / "folder").mkdir()
    assert "a folder with no weights in it" in refusal(config, tmp_path / "folder")


def test_a_tag_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(cfg: dict[str, Any]) -> str:
        raise socket.gaierror("Name or service not known\nTraceback and more")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    assert refusal("ViT-B-32", "openai") == (
        "weights 'openai' of ViT-B-32: cannot be downloaded (Name or service not known); give a "
        "local checkpoint as --pretrained FILE"
    )


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    _, weights = saved(tmp_path, small_model())
    assert "visual.class_embedding is (32,) in the checkpoint and (768,) in the model" in refusal(
        "ViT-B-32", weights
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not valid JSON: Expecting property name"),
        ("[1]", "wanted open_clip's embed_dim, text_cfg, vision_cfg, got list"),
        ('{"embed_dim": 8}', "wanted open_clip's embed_dim, text_cfg, vision_cfg, got embed_dim"),
        (json.dumps(CONFIG | {"text_cfg": 3}), "text_cfg: got 3, wanted an object"),
        (json.dumps(CONFIG | {"wings": 2}), "open_clip cannot build this configuration: "),
        (json.dumps(small_config(text_cfg={"heads": 7})), "open_clip cannot build this "),
    ],
)
def test_malformed_configurations_are_refused(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(content)
    assert problem in refusal(tmp_path / "small.json", allow_random=True)


def test_a_missing_configuration_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.json").endswith("none.json: No such file or directory")


def test_a_hub_model_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(repository: str, filename: str | None = None) -> str:
        raise FileNotFoundError(f"Failed to download {filename} for {repository}\nlong story")

    monkeypatch.setattr("qwt_fx.clip.model_source.download_pretrained_from_hf", offline)
    assert refusal("hf-hub:org/repo") == (
        "hf-hub:org/repo: cannot be downloaded "
        "(Failed to download open_clip_config.json for org/repo)"
    )


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision: got 'int8', wanted one of fp32, bf16, fp16"):
        clip.load("ViT-B-32", precision="int8")


def test_loading_prints_no_warnings_of_other_loggers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        clip.load(*saved(tmp_path, small_model()))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
