"""What people have as a checkpoint: it loads to the same tensors, or one line says what it is."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_clip import CONFIG, small_config, small_model, write_config
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

import qwt_fx
from qwt_fx.cli import main
from qwt_fx.clip.weights import load_weights, read_checkpoint
from qwt_fx.errors import ModelError

State = dict[str, Tensor]


def loaded(path: Path, config: dict[str, Any] | None = None) -> State:
    model = small_model(config, seed=1)
    load_weights(model, read_checkpoint(path), "small")
    return dict(model.state_dict())


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as info:
        loaded(path)
    message = str(info.value)
    assert "\n" not in message and "\x1b" not in message
    return message.replace(str(path), "FILE")


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


class Arguments(dict):  # type: ignore[type-arg]
    """A configuration of a training script: a dict with attributes."""


BESIDE: dict[str, object] = {
    "args": argparse.Namespace(lr=0.1, name="run", nested=argparse.Namespace(a=1)),
    "best": np.float64(0.5),
    "history": np.zeros(3),
    "path": pathlib.PosixPath("/tmp/x"),
    "counts": collections.defaultdict(int, a=1),
    "config": Arguments(a=1),
}
WRAPPED: dict[str, Callable[[State], object]] = {
    **{key: lambda s, key=key: {key: s, "epoch": 3} for key in (
        "state_dict", "state_dict_ema", "model", "model_state_dict", "model_state", "params",
        "params_ema", "module", "net", "weights", "ema",
    )},
    **{prefix: lambda s, prefix=prefix: prefixed(s, prefix) for prefix in (
        "model.", "student.", "module.model.", "clip_model.", "_orig_mod.module.", "base_model.model.",
    )},
    **{f"beside {key}": lambda s, v=value: {"state_dict": s, "x": v} for key, value in BESIDE.items()},
    "nested": lambda s: {"model": {"state_dict": s, "step": 1}, "optimizer": {"state": {0: {"m": s}}}},
    "lightning": lambda s: {
        "state_dict": prefixed(s, "model.") | {"loss.scale": torch.ones(1)}, "callbacks": {"a": {}},
        "pytorch-lightning_version": "2.5", "hyper_parameters": argparse.Namespace(a=1),
    },
    "the same twice": lambda s: {"model": s, "state_dict": s},
}  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPED)
def test_one_model_in_whatever_wrapping_loads(kind: str, tmp_path: Path) -> None:
    state = small_model().state_dict()
    torch.save(WRAPPED[kind](dict(state)), tmp_path / "m.pt")
    found = loaded(tmp_path / "m.pt")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_file_of_an_older_torch_loads_with_what_lies_beside(tmp_path: Path) -> None:
    state = small_model().state_dict()
    torch.save(
        {"state_dict": state, "args": BESIDE["args"]}, tmp_path / "m.pt",
        _use_new_zipfile_serialization=False,
    )  # fmt: skip
    assert torch.equal(loaded(tmp_path / "m.pt")["visual.proj"], state["visual.proj"])


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


class Quieter:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("open('ran', 'w')",)


@pytest.mark.parametrize("bomb", [Bomb(), Quieter()], ids=["os.system", "eval"])
def test_no_code_of_what_lies_beside_is_run(
    bomb: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": small_model().state_dict(), "x": bomb}, tmp_path / "m.pt")
    try:
        loaded(tmp_path / "m.pt")  # eval is never looked up: what it would return is not needed
    except ModelError as error:
        assert "its pickle names posix.system, which could run commands" in str(error)
    assert not (tmp_path / "ran").exists()


def test_a_moving_average_beside_the_model_is_said_and_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, average = small_model().state_dict(), small_model(seed=2).state_dict()
    torch.save({"state_dict": plain, "state_dict_ema": average}, tmp_path / "m.pt")
    assert torch.equal(loaded(tmp_path / "m.pt")["visual.proj"], plain["visual.proj"])
    assert "taking state_dict; it holds state_dict_ema as well" in caplog.text


@pytest.mark.parametrize("content", [
    lambda a, b: {"student": a, "teacher": b},
    lambda a, b: prefixed(a, "student.") | prefixed(b, "teacher."),
])  # fmt: skip
def test_two_models_are_asked_about(content: Callable[..., object], tmp_path: Path) -> None:
    states = (dict(small_model(seed=seed).state_dict()) for seed in (0, 2))
    torch.save(content(*states), tmp_path / "m.pt")
    message = refusal(tmp_path / "m.pt")
    assert "2 different state dicts in it fit the model: student" in message
    assert "teacher" in message and "save the one you want alone" in message


class Pickled(nn.Module):
    """Stands for a whole model saved by torch.save."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


LORA = "base_model.model.visual.transformer.resblocks.0.mlp.c_fc"
REFUSED: dict[str, tuple[object, tuple[str, ...]]] = {
    "module": (Pickled(), ("holds a pickled ", ".Pickled, ", "torch.save(model.state_dict(), FILE)")),
    "module inside": ({"model": Pickled()}, ("Pickled (model)", "torch.save(model.state_dict()")),
    "peft adapter": ({f"{LORA}.lora_A.weight": torch.ones(2)}, (LORA, "merge_and_unload()")),
    "peft whole": (
        {f"{LORA}.base_layer.weight": torch.ones(2), f"{LORA}.lora_A.default.weight": torch.ones(2)},
        ("PEFT (LoRA)", "merge_and_unload()"),
    ),
    "parametrized": (
        {"visual.conv1.parametrizations.weight.original": torch.ones(2)},
        ("remove_parametrizations",),
    ),
    "quantized": ({"visual.x.weight.quant_map": torch.ones(2)}, ("quantized already",)),
    "nothing": ({"epoch": 1, "lr": 0.1}, ("holds no state dict", "got the keys epoch, lr")),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_loaded_is_named_with_what_to_do(kind: str, tmp_path: Path) -> None:
    content, parts = REFUSED[kind]
    torch.save(content, tmp_path / "m.pt")
    message = refusal(tmp_path / "m.pt")
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(("data", "part"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    (b"<!DOCTYPE html><html>Not found</html>", "a web page"),
    (b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file"),
])  # fmt: skip
def test_a_file_of_another_kind_is_named(data: bytes, part: str, tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(data)
    assert part in refusal(tmp_path / "m.bin")


FOLDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "peft": (("adapter_config.json", "adapter_model.safetensors"), "merge_and_unload()"),
    "fsdp": ((".metadata", "__0_0.distcp"), "dcp_to_torch_save"),
    "deepspeed": (("latest", "zero_to_fp32.py"), "zero_to_fp32.py"),
    "two": (("a.pt", "b.pt"), "several files (a.pt, b.pt): name one of them"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_another_kind_is_named(kind: str, tmp_path: Path) -> None:
    names, part = FOLDERS[kind]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert part in refusal(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_load_by_their_index_and_by_their_folder(suffix: str, tmp_path: Path) -> None:
    state = dict(small_model().state_dict())
    base = "model" if suffix == "safetensors" else "pytorch_model"
    names = list(state)
    places = {n: f"{base}-0000{1 + i % 3}-of-00003.{suffix}" for i, n in enumerate(names)}
    for file in sorted(set(places.values())):
        part = {n: state[n] for n in names if places[n] == file}
        (save_file if suffix == "safetensors" else torch.save)(part, tmp_path / file)
    index = tmp_path / f"{base}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for path in (index, tmp_path):
        found = loaded(path)
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    (tmp_path / f"{base}-00002-of-00003.{suffix}").unlink()
    assert "1 of its 3 shards are not beside it: " in refusal(index)
    index.write_text("{}")
    assert 'a JSON file without a "weight_map"' in refusal(index)


def hugging_face_clip() -> Any:
    vision, text = CONFIG["vision_cfg"], CONFIG["text_cfg"]
    torch.manual_seed(0)
    config = CLIPConfig(
        projection_dim=16,
        vision_config={
            "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "image_size": 16,
            "num_attention_heads": vision["width"] // vision["head_width"], "patch_size": 8,
            "hidden_act": "gelu",
        },
        text_config={
            "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": text["heads"], "vocab_size": text["vocab_size"],
            "max_position_embeddings": 12, "hidden_act": "gelu", "eos_token_id": 49407,
        },
    )  # fmt: skip
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def test_transformers_clip_gives_the_same_embeddings(tmp_path: Path) -> None:
    theirs = hugging_face_clip()
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25] * 3, "resample": 2})
    )
    assert (tmp_path / "model.safetensors.index.json").exists()
    config = small_config(vision_cfg={"image_size": 16}, quick_gelu=True)
    written = write_config(tmp_path / "small.json", config)
    model = qwt_fx.clip.load(written, tmp_path)
    assert model.model_config["quick_gelu"] is False  # config.json says gelu
    assert model.preprocess["mean"] == (0.5, 0.5, 0.5)
    assert model.preprocess["interpolation"] == "bilinear"
    images, ids = model.image_example(3), model.text_example(3)
    ids[torch.arange(3), ids.argmax(-1)] = 49407
    with torch.no_grad():
        image = theirs.get_image_features(pixel_values=images).pooler_output
        text = theirs.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(model.image(images), image, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.text(ids), text, rtol=1e-4, atol=1e-5)


def test_transformers_clip_without_its_folder_loads_too(tmp_path: Path) -> None:
    theirs = hugging_face_clip()
    torch.save({"model": theirs.state_dict()}, tmp_path / "m.pt")
    config = small_config(vision_cfg={"image_size": 16})
    found = loaded(tmp_path / "m.pt", config)
    assert torch.equal(found["visual.proj"], theirs.visual_projection.weight.T)
    custom = loaded(tmp_path / "m.pt", config | {"custom_text": True})
    assert torch.equal(custom["text.text_projection"], theirs.text_projection.weight.T)


@pytest.mark.slow
def test_transformers_siglip_gives_the_same_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = SiglipModel(
        SiglipConfig(
            text_config={"vocab_size": 100, "num_hidden_layers": 2, "max_position_embeddings": 64},
            vision_config={"num_hidden_layers": 12, "image_size": 224},
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    config = qwt_fx.clip.model_source.open_clip.get_model_config("ViT-B-16-SigLIP")
    config["text_cfg"] |= {"vocab_size": 100, "layers": 2}
    model = qwt_fx.clip.load(write_config(tmp_path / "s.json", config), tmp_path)
    images, ids = torch.randn(2, 3, 224, 224), torch.randint(1, 100, (2, 64))
    with torch.no_grad():
        image = theirs.get_image_features(pixel_values=images).pooler_output
        text = theirs.get_text_features(input_ids=ids).pooler_output
        # open_clip computes GELU itself, transformers its tanh approximation.
        assert float((model.image(images) - image).norm() / image.norm()) < 2e-3
        assert float((model.text(ids) - text).norm() / text.norm()) < 2e-3


def test_a_path_that_is_no_model_is_not_an_unknown_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "open_clip_config.json").write_text("{}")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"")
    (tmp_path / "m.pt").write_bytes(b"")
    for name, part in (
        ("none", "no such file or folder"), ("empty", "a folder, but no artifact of qwt-fx"),
        ("hub", f"local-dir:{tmp_path / 'hub'}"), ("weights", "as --pretrained"),
        ("m.pt", "a file; wanted an artifact"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=str(tmp_path)) as info:
            qwt_fx.clip.load(tmp_path / name)
        assert part in str(info.value) and "unknown model" not in str(info.value)
    assert main(["eval", "--model", "ViT-B-23", "--imagenet-val", str(tmp_path)]) == 2
    assert "unknown model 'ViT-B-23': did you mean ViT-B-32" in capsys.readouterr().err
