from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_graphs import assert_same, captured, converted, mutate, reseal, seal
from torch import nn

from qwt_fx.artifact import artifact as artifact_module
from qwt_fx.artifact import graph_json
from qwt_fx.artifact.artifact import load_graph, read_artifact, save_graph, write_artifact
from qwt_fx.errors import ArtifactError, OutputError, QwtError
from qwt_fx.graph.graph_info import graph_info

EXTRA = {"clip": {"name": "ViT", "logit_scale": 0.1 + 0.2, "mean": (0.5, 0.25)}, "none": None}
CONFIG = {"w_bits": 4, "overrides": {"*.c_proj": "w8a8"}}
FILES = (
    "artifact.json",
    "image.graph.json",
    "image.safetensors",
    "text.graph.json",
    "text.safetensors",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    towers = {"image": converted(4), "text": converted(6)}
    write_artifact(folder, towers, config=CONFIG, extra=EXTRA)
    return folder


@pytest.fixture
def clip(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "artifact"))


def index_of(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / "artifact.json").read_text())
    return index


# -- what survives -----------------------------------------------------------------------------


def test_towers_config_and_extra_survive(tmp_path: Path) -> None:
    towers = {"image": converted(4), "text": captured()}
    sizes = write_artifact(tmp_path, towers, config=CONFIG, extra=EXTRA)
    found = read_artifact(tmp_path)
    assert list(found.towers) == ["image", "text"]
    for name, gm in towers.items():
        assert_same(gm, found.towers[name])
        assert_same(gm, found.towers[name], batch=1)
        assert sizes.towers[name] == (tmp_path / f"{name}.safetensors").stat().st_size
    assert found.config == CONFIG
    assert found.extra == {**EXTRA, "clip": {**EXTRA["clip"], "mean": [0.5, 0.25]}}  # type: ignore[dict-item]
    assert found.versions["torch"] == torch.__version__
    assert {p.name for p in tmp_path.iterdir()} == set(FILES)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_width_is_packed_and_bit_identical(bits: int, tmp_path: Path) -> None:
    gm = converted(bits, tied=False)
    save_graph(gm, tmp_path / "a")
    back = load_graph(tmp_path / "a")
    assert_same(gm, back)
    stored = load_file(tmp_path / "a" / "model.safetensors")
    codes = [v for k, v in stored.items() if "_codes" in k]
    assert {v.numel() for v in codes} == {8 * bits}
    names = [n for n, _ in gm.named_buffers() if "_codes" in n]
    assert all(torch.equal(gm.get_buffer(n), back.get_buffer(n)) for n in names)


def test_two_saves_of_one_graph_are_the_same_bytes(tmp_path: Path) -> None:
    save_graph(converted(), tmp_path / "a")
    save_graph(load_graph(tmp_path / "a"), tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_a_loaded_graph_does_not_depend_on_its_files(tmp_path: Path) -> None:
    gm = converted()
    save_graph(gm, tmp_path / "a")
    back = load_graph(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"")
    shutil.rmtree(tmp_path / "a")
    assert_same(gm, back)
    assert all(v.data_ptr() % 64 == 0 for v in back.state_dict().values())


def test_views_of_one_memory_are_stored_apart(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = torch.randn(4, 4)
            self.register_buffer("a", base[:2])
            self.register_buffer("b", base[1:])
            self.register_buffer("c", base[:1].expand(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.a.T @ self.b[:2] @ self.c.T

    from qwt_fx.capture.capture import capture

    gm = capture(Views(), (torch.randn(2, 4),))
    save_graph(gm, tmp_path / "a")
    x = torch.randn(3, 4)
    assert torch.equal(load_graph(tmp_path / "a")(x), gm(x))


def test_a_quantized_model_survives(tmp_path: Path) -> None:
    import qwt_fx

    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    x = torch.randn(16, 8)
    config = qwt_fx.QuantConfig(w_bits=4, a_bits=6)
    quantized = qwt_fx.quantize(model, (x,), [(x,)], config)
    qwt_fx.save(quantized, tmp_path / "a")
    back = qwt_fx.load(tmp_path / "a")
    assert torch.equal(back(x), quantized(x))
    described = [
        [(n.name, n.op == "placeholder" or str(n.target), str(n.args)) for n in gm.graph.nodes]
        for gm in (back, quantized)
    ]
    assert described[0] == described[1]
    assert graph_info(back).passes == json.loads(json.dumps(graph_info(quantized).passes))


# -- kinds and refusals --------------------------------------------------------------------------


def test_load_on_a_clip_names_clip_load(clip: Path) -> None:
    with pytest.raises(ArtifactError, match=r"qwt_fx\.clip\.load"):
        load_graph(clip)


def test_an_unstorable_graph_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    gm = captured()
    graph_info(gm).unstorable = "non-integer zero points"
    with pytest.raises(ArtifactError, match="non-integer zero points"):
        save_graph(gm, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_saving_parses_and_builds_a_graph_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for owner, name in ((graph_json, "parse_document"), (artifact_module, "build")):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=function: calls.append(f.__name__) or f(*a))
    save_graph(captured(), tmp_path / "a")
    assert calls == ["parse_document", "build"]


@pytest.mark.parametrize("extra", [{"a": object()}, {"a": torch.ones(1)}, {1: 2}, {"$float": "1"}])
def test_extra_that_json_cannot_hold_is_refused(tmp_path: Path, extra: Any) -> None:
    with pytest.raises(ArtifactError, match="extra"):
        write_artifact(tmp_path, {"model": captured()}, config={}, extra=extra)


@pytest.mark.parametrize("name", ["", "../image", "a/b", "Image", "a.b", "1a", "a" * 99])
def test_tower_names_must_be_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="tower name"):
        write_artifact(tmp_path, {name: captured()}, config={}, extra={})


def test_no_tower_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="at least one tower"):
        write_artifact(tmp_path, {}, config={}, extra={})


def test_a_full_disk_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact_module, "save_file", full)
    with pytest.raises(OutputError, match=r"model\.safetensors: No space left"):
        save_graph(captured(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        read_artifact(tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"it has no artifact\.json"):
        read_artifact(tmp_path)
    (tmp_path / "artifact.json").write_text('{"schema": 1}')
    with pytest.raises(ArtifactError, match="is not a qwt-fx artifact"):
        read_artifact(tmp_path)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_named(clip: Path, name: str) -> None:
    (clip / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: missing"):
        read_artifact(clip)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_folder_or_pipe_in_place_of_a_file_is_refused(clip: Path, name: str) -> None:
    (clip / name).unlink()
    (clip / name).mkdir()
    with pytest.raises(ArtifactError, match=f"{name}: missing, or not a plain file"):
        read_artifact(clip)
    (clip / name).rmdir()
    os.mkfifo(clip / name)
    with pytest.raises(ArtifactError, match=f"{name}: missing, or not a plain file"):
        read_artifact(clip)


def test_parts_of_another_artifact_are_refused_and_other_files_left_alone(clip: Path) -> None:
    (clip / "report.json").write_text("{}")
    (clip / "README.md").write_text("notes")
    read_artifact(clip)
    (clip / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"model\.safetensors: is not a file of this artifact"):
        read_artifact(clip)


def test_swapped_files_are_refused(clip: Path) -> None:
    (clip / "image.safetensors").rename(clip / "x")
    (clip / "text.safetensors").rename(clip / "image.safetensors")
    (clip / "x").rename(clip / "text.safetensors")
    with pytest.raises(ArtifactError, match=r"image\.safetensors: damaged"):
        read_artifact(clip)


@pytest.mark.parametrize("name", FILES)
def test_a_link_that_leaves_the_folder_is_refused(clip: Path, tmp_path: Path, name: str) -> None:
    (clip / name).rename(tmp_path / name)
    (clip / name).symlink_to(tmp_path / name)
    with pytest.raises(ArtifactError, match=f"{name}: is a link that leaves"):
        read_artifact(clip)


def test_a_link_in_a_circle_is_refused(clip: Path) -> None:
    (clip / "text.graph.json").unlink()
    (clip / "text.graph.json").symlink_to("text.graph.json")
    with pytest.raises(ArtifactError, match=r"text\.graph\.json"):
        read_artifact(clip)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "image.pkl", "..", "", "é"]
)
def test_names_that_escape_are_refused(clip: Path, name: str) -> None:
    index = index_of(clip)
    index["files"][name] = index["files"].pop("image.safetensors")
    seal(clip, index)
    with pytest.raises(ArtifactError, match=r"artifact\.json: files"):
        read_artifact(clip)


@pytest.mark.parametrize("name", ["../image", "a/b", "", "Image", None, 3, ["image"]])
def test_towers_that_escape_are_refused(clip: Path, name: Any) -> None:
    index = index_of(clip)
    index["towers"][0] = name
    seal(clip, index)
    with pytest.raises(ArtifactError, match=r"artifact\.json: tower name"):
        read_artifact(clip)


def test_a_version_from_the_future_is_refused_with_the_remedy(clip: Path) -> None:
    index = index_of(clip)
    (clip / "artifact.json").write_text(json.dumps(index | {"qwt_fx_artifact": 2, "new": 1}))
    with pytest.raises(ArtifactError, match=r"schema 2 is newer .*pip install --upgrade"):
        read_artifact(clip)


@pytest.mark.parametrize("schema", [0, -1, True, "1", None, 1.0])
def test_an_unknown_schema_is_refused(clip: Path, schema: Any) -> None:
    seal(clip, index_of(clip) | {"qwt_fx_artifact": schema})
    with pytest.raises(ArtifactError, match="is not known"):
        read_artifact(clip)


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 2}', '{"a": NaN}', '{"a": 1e999}', "[" * 100_000, '{"a": ' * 200, "\xff", "",
     "1" * 5000, "[]", "null"],
)  # fmt: skip
def test_an_index_that_is_not_strict_json_is_refused(clip: Path, text: str) -> None:
    (clip / "artifact.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"artifact\.json: "):
        read_artifact(clip)


def test_an_edited_configuration_is_refused(clip: Path) -> None:
    text = (clip / "artifact.json").read_text()
    (clip / "artifact.json").write_text(text.replace('"w_bits": 4', '"w_bits": 6'))
    with pytest.raises(ArtifactError, match=r"artifact\.json: damaged"):
        read_artifact(clip)


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return (os.putenv, ("QWT_FX_RAN", "1"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_swapped_in_pickle_is_refused_and_not_run(clip: Path, name: str, writer: str) -> None:
    if writer == "pickle":
        (clip / name).write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"a": Bomb()}, clip / name)
    if name != "artifact.json":
        with pytest.raises(ArtifactError, match=f"{name}: damaged"):
            read_artifact(clip)
        reseal(clip)  # even when the digests fit
    with pytest.raises(ArtifactError, match=name):
        read_artifact(clip)
    assert os.system('test -z "$QWT_FX_RAN"') == 0


@pytest.mark.parametrize("change", ["dtype", "shape", "missing", "more", "packed"])
def test_tensors_that_are_not_as_recorded_are_refused(clip: Path, change: str) -> None:
    path = clip / "image.safetensors"
    tensors = load_file(path)
    name = next(k for k in tensors if ("_codes" in k) == (change == "packed"))
    if change == "missing":
        del tensors[name]
    elif change == "more":
        tensors["more"] = torch.ones(1)
    elif change == "dtype":
        tensors[name] = tensors[name].to(torch.float16)
    else:
        tensors[name] = torch.cat([tensors[name].flatten(), tensors[name].flatten()])
    save_file(tensors, path)
    reseal(clip)
    with pytest.raises(ArtifactError, match=r"image\.safetensors: .*wanted|the tensor"):
        read_artifact(clip)


# -- fuzz ----------------------------------------------------------------------------------------


def _damage_files(original: Path, folder: Path, cases: range) -> None:
    """Bit flips, truncations, appended and overwritten bytes: refused, or content-equal JSON."""
    intact = index_of(original)
    for seed in cases:
        choose = random.Random(seed)
        name = FILES[seed % len(FILES)]
        data = bytearray((original / name).read_bytes())
        at = choose.randrange(len(data))
        action = choose.randrange(4)
        if action == 0:
            data[at] ^= 1 << choose.randrange(8)
        elif action == 1:
            del data[at:]
        elif action == 2:
            data[at : at + 16] = choose.randbytes(16)
        else:
            data[at:at] = choose.randbytes(choose.randint(1, 64))
        if bytes(data) == (original / name).read_bytes():
            continue
        (folder / name).write_bytes(data)
        try:
            read_artifact(folder)
        except QwtError as error:
            assert name in str(error), (seed, error)
        else:  # only spacing of the index may differ: its content carries a digest
            assert name == "artifact.json" and json.loads(data) == intact, seed
        shutil.copy(original / name, folder / name)
    read_artifact(folder)


def test_damaged_files_are_refused_by_name(original: Path, clip: Path) -> None:
    _damage_files(original, clip, range(200))


@pytest.mark.slow
def test_damaged_files_are_refused_by_name_2000(original: Path, clip: Path) -> None:
    _damage_files(original, clip, range(1000, 3000))


def _tamper(original: Path, folder: Path, cases: range) -> None:
    """Changes whose digests were made to fit: loaded as graphs of listed operators, or refused."""
    os.environ.pop("QWT_FX_RAN", None)
    for seed in cases:
        choose = random.Random(seed)
        name = FILES[seed % len(FILES)]
        data = (original / name).read_bytes()
        if name == "artifact.json":
            seal_any(folder, mutate(json.loads(data), choose))
        elif name.endswith(".json"):
            (folder / name).write_text(json.dumps(mutate(json.loads(data), choose)))
            reseal(folder)
        else:
            damaged = bytearray(data)
            for _ in range(choose.randint(1, 4)):  # mostly in the header, which is parsed
                damaged[choose.randrange(min(len(data), 2000))] = choose.randrange(256)
            (folder / name).write_bytes(damaged)
            reseal(folder)
        try:
            read_artifact(folder)
        except QwtError as error:
            assert "\n" not in str(error) and len(str(error)) < 600, seed
        shutil.copy(original / name, folder / name)
        shutil.copy(original / "artifact.json", folder / "artifact.json")
    assert "QWT_FX_RAN" not in os.environ


def seal_any(folder: Path, index: Any) -> None:
    if isinstance(index, dict):
        seal(folder, index)
    else:
        (folder / "artifact.json").write_text(json.dumps(index))


def test_tampered_artifacts_never_crash(original: Path, clip: Path) -> None:
    _tamper(original, clip, range(200))


@pytest.mark.slow
def test_tampered_artifacts_never_crash_2000(original: Path, clip: Path) -> None:
    _tamper(original, clip, range(1000, 3000))
