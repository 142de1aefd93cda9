"""Checkpoints of every kind load to the same tensors; one that does not fit says where."""

from __future__ import annotations

import os
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_clip import small_config, small_model, write_openai_archive
from torch import Tensor

from qwt_fx.clip.weights import load_weights, read_checkpoint
from qwt_fx.errors import ModelError


def training_checkpoint(path: Path, model: Any) -> None:
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer}, path)


def compiled_checkpoint(path: Path, model: Any) -> None:
    state = {f"module._orig_mod.{name}": t for name, t in model.state_dict().items()}
    torch.save({"state_dict": state}, path)


def legacy_pickle(path: Path, model: Any) -> None:
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)


KINDS: dict[str, tuple[str, Callable[[Path, Any], Any]]] = {
    "bare": ("model.pt", lambda path, model: torch.save(model.state_dict(), path)),
    "legacy": ("model.pt", legacy_pickle),
    "training": ("epoch_3.pt", training_checkpoint),
    "compiled": ("epoch_3.pt", compiled_checkpoint),
    "safetensors": ("m.safetensors", lambda path, model: save_file(model.state_dict(), path)),
    "safetensors by content": ("m.bin", lambda path, model: save_file(model.state_dict(), path)),
    "openai": ("ViT-B-32.pt", write_openai_archive),
}


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_model_its_tensors(kind: str, tmp_path: Path) -> None:
    model, (file, write) = small_model(), KINDS[kind]
    write(tmp_path / file, model)
    checkpoint = read_checkpoint(tmp_path / file)
    assert checkpoint.openai == (kind == "openai")
    other = small_model(seed=1)
    load_weights(other, checkpoint, "small")
    assert_same(other.state_dict(), model.state_dict())


def test_a_bare_state_dict_of_openais_archive_is_known_as_openais(tmp_path: Path) -> None:
    model = small_model()
    sizes = {"input_resolution": 16, "context_length": 12, "vocab_size": 9}
    extra = {name: torch.tensor(value) for name, value in sizes.items()}
    torch.save(model.state_dict() | extra, tmp_path / "m.pt")
    checkpoint = read_checkpoint(tmp_path / "m.pt")
    assert checkpoint.openai
    assert_same(dict(checkpoint.states)[""], model.state_dict())


def test_half_precision_weights_are_upcast(tmp_path: Path) -> None:
    model = small_model()
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "m.pt")
    other = small_model(seed=1)
    load_weights(other, read_checkpoint(tmp_path / "m.pt"), "small")
    assert_same(other.state_dict(), {name: tensor.float() for name, tensor in state.items()})


def test_a_clip_checkpoint_fits_the_custom_text_layout(tmp_path: Path) -> None:
    model = small_model()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    custom = small_model(small_config(custom_text=True), seed=1)
    load_weights(custom, read_checkpoint(tmp_path / "m.pt"), "custom")
    assert torch.equal(custom.text.text_projection, model.text_projection)


def test_scalars_of_either_shape_fit_and_a_missing_logit_bias_is_zero(tmp_path: Path) -> None:
    state = small_model().state_dict()
    state["logit_scale"] = state["logit_scale"].reshape(1)
    torch.save(state, tmp_path / "m.pt")
    model = small_model(small_config(init_logit_bias=-10.0))
    load_weights(model, read_checkpoint(tmp_path / "m.pt"), "small")
    assert model.logit_scale.item() == 3.0
    assert model.logit_bias.item() == 0.0


def test_constants_that_the_model_makes_itself_are_ignored(tmp_path: Path) -> None:
    model = small_model()
    torch.save(model.state_dict() | {"attn_mask": torch.zeros(12, 12)}, tmp_path / "m.pt")
    other = small_model(seed=1)
    mask = other.attn_mask.clone()
    load_weights(other, read_checkpoint(tmp_path / "m.pt"), "small")
    assert torch.equal(other.attn_mask, mask)


def refusal(path: Path, config: dict[str, Any] | None = None) -> str:
    with pytest.raises(ModelError) as info:
        load_weights(small_model(config), read_checkpoint(path), "small")
    message = str(info.value)
    assert "\n" not in message
    return message.replace(str(path), "FILE")


def test_other_widths_are_named_with_both_shapes(tmp_path: Path) -> None:
    wider = small_model(small_config(vision_cfg={"width": 48}, text_cfg={"layers": 3}))
    torch.save(wider.state_dict(), tmp_path / "m.pt")
    message = refusal(tmp_path / "m.pt")
    assert message.startswith(
        "checkpoint FILE does not fit the model small: 32 shapes differ: visual.class_embedding "
        "is (48,) in the checkpoint and (32,) in the model; "
    )
    assert message.endswith(
        "; 12 unexpected: transformer.resblocks.2.ln_1.weight, "
        "transformer.resblocks.2.ln_1.bias, transformer.resblocks.2.attn.in_proj_weight, ..."
    )


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    state = small_model().state_dict()
    del state["ln_final.bias"]
    torch.save(state, tmp_path / "m.pt")
    assert refusal(tmp_path / "m.pt") == (
        "checkpoint FILE does not fit the model small: 1 missing: ln_final.bias"
    )


def test_position_embeddings_of_another_image_size_are_not_interpolated(tmp_path: Path) -> None:
    larger = small_model(small_config(vision_cfg={"image_size": [32, 24]}))
    torch.save(larger.state_dict(), tmp_path / "m.pt")
    assert refusal(tmp_path / "m.pt") == (
        "checkpoint FILE does not fit the model small: 1 shapes differ: "
        "visual.positional_embedding is (13, 32) in the checkpoint and (7, 32) in the model"
    )


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.pt") == "checkpoint FILE: no such file"
    assert refusal(tmp_path).startswith("checkpoint FILE: a folder with no weights in it; wanted ")
    for name, data in (
        ("empty.pt", b""),
        ("text.pt", b"hello, this is a text\n" * 9),
        ("short.safetensors", b"\x10\0\0\0\0\0\0\0{"),
    ):
        (tmp_path / name).write_bytes(data)
        assert refusal(tmp_path / name).startswith("checkpoint FILE: cannot be read: ")


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_files_are_refused(kind: str, tmp_path: Path) -> None:
    file, write = KINDS[kind]
    write(tmp_path / file, small_model())
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[: len(data) // 2])
    assert refusal(tmp_path / file).startswith("checkpoint FILE: cannot be read: ")


@pytest.mark.parametrize("content", [{}, {"epoch": 1}, {"state_dict": {"a": 1}}, [1], 7])
def test_a_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    assert refusal(tmp_path / "m.pt").startswith("checkpoint FILE: holds no state dict; wanted ")


class Scripted(torch.nn.Module):
    """Rebuilds itself by code that runs while the archive is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.weight = state[0] * 7.0  # what it would compute from the stored tensor
        self.training = state[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_code_of_an_archive_runs_only_when_allowed(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Scripted()), str(path))
    message = refusal(path)
    assert "without running its code" in message and "--allow-torchscript" in message
    allowed = read_checkpoint(path, allow_torchscript=True)
    assert torch.equal(allowed.states[0][1]["weight"], torch.full((2,), 7.0))


def test_no_code_of_openais_archive_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_openai_archive(tmp_path / "m.pt", small_model())

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("torch.jit.load runs code of the archive")

    monkeypatch.setattr(torch.jit, "load", forbidden)
    assert read_checkpoint(Path(path)).openai


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def _with_pickle(source: str, target: Path, data: bytes) -> Path:
    """A copy of an archive with another data.pkl."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            swap = info.filename.endswith("/data.pkl")
            new.writestr(info.filename, data if swap else old.read(info))
    return target


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Bomb(), protocol=2),
        pickle.dumps(Bomb(), protocol=5),
        b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02Nr\xff\xff\xff\xff.",  # a memo of 4 billion entries
        b"\x80\x02}.",
        b"\x80\x02K\x01.",
    ],
)
def test_a_swapped_in_pickle_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    good = write_openai_archive(tmp_path / "good.pt", small_model())
    message = refusal(_with_pickle(good, tmp_path / "m.pt", data))
    assert "without running its code" in message
    assert not (tmp_path / "ran").exists()


def test_damaged_archives_never_crash_nor_load_as_something_else(tmp_path: Path) -> None:
    good = write_openai_archive(tmp_path / "good.pt", small_model())
    data, wanted = Path(good).read_bytes(), small_model().state_dict()
    with zipfile.ZipFile(good) as archive:
        pickled = archive.read("good/data.pkl")
    for seed in range(60):
        choose = random.Random(seed)
        target = tmp_path / "m.pt"
        if seed % 2:  # bytes anywhere
            damaged = bytearray(data)
            damaged[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
            target.write_bytes(damaged)
        else:  # the pickle, with a checksum that fits
            damaged = bytearray(pickled)
            damaged[choose.randrange(len(pickled))] = choose.randrange(256)
            _with_pickle(good, target, bytes(damaged))
        try:
            state = dict(read_checkpoint(target).states)[""]
            load_weights(small_model(), read_checkpoint(target), "small")
        except ModelError:
            continue
        if seed % 2:
            assert_same(state, wanted)
