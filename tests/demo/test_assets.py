"""The shipped demo loads into open_clip, is complete and small, and its files are readable."""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import webdataset
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from qwt_fx.demo import assets
from qwt_fx.errors import ConfigError, OutputError

CLASSES = 1600


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's files, variant `plain`."""
    directory = tmp_path_factory.mktemp("demo")
    assets.write_files(directory)
    return directory


@pytest.fixture(scope="module")
def model(written: Path) -> CLIP:
    """The written model, loaded strictly by open_clip's own functions."""
    config = json.loads((written / "model.json").read_text(encoding="utf-8"))
    model = CLIP(**config).eval()
    open_clip.load_checkpoint(model, str(written / "model.safetensors"), strict=True)
    return model


def test_assets_are_at_most_16_mb_and_carry_a_card() -> None:
    folder = files("qwt_fx.demo").joinpath("assets")
    sizes = {entry.name: len(entry.read_bytes()) for entry in folder.iterdir()}
    assert set(sizes) == {
        *assets.TEXT_FILES,
        *assets.SHARDS,
        "weights.safetensors",
        "val.zip",
        "CARD.md",
    }
    assert sum(sizes.values()) <= 16_000_000


def test_exactly_the_promised_files_are_written(written: Path) -> None:
    assert {path.name for path in written.iterdir()} == {
        "model.json",
        "model.safetensors",
        "calib-000.tar",
        "calib-001.tar",
        "calib-002.tar",
        "calib-003.tar",
        "val",
        "classnames.txt",
        "templates.txt",
    }
    assert not list(written.rglob("*.partial"))


def test_the_model_is_as_large_as_promised(model: CLIP) -> None:
    config = assets.demo_config()
    assert config["quick_gelu"] is True
    assert len(model.visual.transformer.resblocks) >= 8
    assert len(model.transformer.resblocks) >= 6
    assert config["text_cfg"]["width"] >= 96
    assert model.context_length == 77


def test_the_configuration_works_by_name_in_open_clip(written: Path, tmp_path: Path) -> None:
    name = "qwt-demo-test"
    (tmp_path / f"{name}.json").write_bytes((written / "model.json").read_bytes())
    open_clip.add_model_config(tmp_path)
    loaded = open_clip.create_model(name, pretrained=str(written / "model.safetensors"))
    state = assets.demo_state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())


def test_the_reference_is_exact_in_fp16_and_zero_in_unused_token_rows(written: Path) -> None:
    state = load_file(written / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert all(torch.equal(tensor.half().float(), tensor) for tensor in state.values())
    used = state["token_embedding.weight"].abs().sum(dim=1) > 0
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    text = (written / "classnames.txt").read_text(encoding="utf-8").splitlines()
    templates = (written / "templates.txt").read_text(encoding="utf-8").splitlines()
    ids = torch.unique(tokenizer([style.format(name) for style in templates for name in text]))
    assert bool(used[ids].all())
    assert int(used.sum()) < 100


def test_shards_hold_enough_decodable_pairs_with_known_words(written: Path) -> None:
    sizes = []
    known = assets.demo_state_dict()["token_embedding.weight"].abs().sum(dim=1) > 0
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    for name in assets.SHARDS:
        pairs: list[tuple[Any, Any]] = list(
            webdataset.WebDataset(str(written / name), shardshuffle=False, empty_check=False)
            .decode("rgb8")
            .to_tuple("png", "txt")
        )
        sizes.append(len(pairs))
        assert all(image.shape == (32, 48, 3) for image, _ in pairs)
        assert bool(known[tokenizer([caption for _, caption in pairs])].all())
    assert sum(sizes) >= 640
    assert len(set(sizes)) > 1


def test_every_class_has_a_validation_image_and_a_name(written: Path) -> None:
    folders = sorted(path.name for path in (written / "val").iterdir())
    assert folders == [f"{label:04d}" for label in range(CLASSES)]
    images = list((written / "val").rglob("*.png"))
    assert len(images) >= CLASSES
    assert len({path.parent.name for path in images}) == CLASSES
    names = (written / "classnames.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(names)) == len(names) == CLASSES
    templates = (written / "templates.txt").read_text(encoding="utf-8").splitlines()
    assert templates and all(style.count("{}") == 1 for style in templates)


@torch.no_grad()
def test_zero_shot_accuracy_on_a_sample_of_the_validation_images(
    written: Path, model: CLIP
) -> None:
    """Over all 1,600 classes, by one template and every eighth image."""
    names = (written / "classnames.txt").read_text(encoding="utf-8").splitlines()
    style = (written / "templates.txt").read_text(encoding="utf-8").splitlines()[0]
    tokens = open_clip.SimpleTokenizer(context_length=77)([style.format(name) for name in names])
    # Cutting the context after the longest caption is exact under the causal mask.
    length = int(tokens.argmax(dim=1).max()) + 1
    short = copy.deepcopy(model)
    short.positional_embedding = nn.Parameter(model.positional_embedding[:length])
    short.attn_mask = model.attn_mask[:length, :length]
    classes = short.encode_text(tokens[:, :length], normalize=True)
    paths = sorted((written / "val").rglob("*.png"))[::8]
    # open_clip's own preprocessing must leave images of the model's size as they are.
    preprocess = open_clip.image_transform((32, 48), is_train=False)
    first = Image.open(paths[0])
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    pixels = (np.asarray(first) / 255.0 - np.array(mean)) / np.array(std)
    torch.testing.assert_close(
        preprocess(first), torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)
    )
    batch = torch.stack([preprocess(Image.open(path)) for path in paths])
    features = F.normalize(model.encode_image(batch), dim=-1)
    truth = torch.tensor([int(path.parent.name) for path in paths])
    top1 = float(((features @ classes.T).argmax(dim=-1) == truth).float().mean())
    assert top1 >= 0.85


def test_writing_twice_replaces_and_a_strange_image_is_refused(tmp_path: Path) -> None:
    assets.write_files(tmp_path)
    (tmp_path / "templates.txt").write_text("broken", encoding="utf-8")
    assets.write_files(tmp_path, "hard")
    assert "{}" in (tmp_path / "templates.txt").read_text(encoding="utf-8")
    hard = load_file(tmp_path / "model.safetensors")
    name = "visual.transformer.resblocks.0.ln_1.weight"
    assert not torch.equal(hard[name], assets.demo_state_dict("plain")[name])
    (tmp_path / "val" / "0000" / "mine.png").write_bytes(b"")
    with pytest.raises(OutputError, match=r"0000/mine\.png"):
        assets.write_files(tmp_path)


def test_an_unwritable_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot write"):
        assets.write_files(tmp_path / "file" / "below")


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ConfigError, match="plain, hard"):
        assets.demo_state_dict("easy")
