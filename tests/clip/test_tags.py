"""Images are prepared as the weights were trained; what a file does not tell is asked, not guessed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from small_clip import small_config, small_model, write_config, write_openai_archive

from qwt_fx.clip import clip
from qwt_fx.clip.preprocessing import PreprocessOverrides, describe
from qwt_fx.clip.tags import of_file, of_tag, unusual_flags
from qwt_fx.errors import ConfigError, ModelError

NONE = PreprocessOverrides()
PAIRS = [
    (name, tag)
    for name in open_clip.list_models()
    for tag in open_clip.list_pretrained_tags_by_model(name)
]
ALIKE = {
    name
    for name, _ in PAIRS
    if len({str(of_tag(name, t)) for t in open_clip.list_pretrained_tags_by_model(name)}) == 1
}


@pytest.mark.parametrize("name", sorted({name for name, _ in PAIRS}))
def test_a_file_is_prepared_as_its_tag_would_be(name: str) -> None:
    """Every tag of every model: open_clip's own transform, from the file with or without flags."""
    for tag in open_clip.list_pretrained_tags_by_model(name):
        wanted = of_tag(name, tag)
        said = {} if name in ALIKE else {f: wanted[f] for f in ("mean", "std", "resize_mode")}
        assert of_file(name, openai=False, overrides=PreprocessOverrides(**said)) | said == wanted
        told = open_clip.get_pretrained_cfg(name, tag)
        for field in ("mean", "std", "interpolation", "resize_mode"):
            assert told[field] is None or tuple(told[field]) == tuple(wanted[field])  # type: ignore


def test_the_registry_has_tags_unlike_the_default() -> None:
    """What made this a fault: most of them are not OpenAI's."""
    usual = of_tag("ViT-B-32", "openai")
    unlike = {name for name, tag in PAIRS if of_tag(name, tag) != usual}
    assert {"ViT-B-16-SigLIP", "MobileCLIP2-S0", "MobileCLIP2-S2"} <= unlike
    assert len(unlike) > 40


def test_where_tags_differ_the_user_is_asked_with_the_flags_to_give() -> None:
    assert "ViT-H-14-quickgelu" not in ALIKE
    with pytest.raises(ModelError) as error:
        of_file("ViT-H-14-quickgelu", openai=False, overrides=NONE)
    assert str(error.value) == (
        "ViT-H-14-quickgelu: its tags were trained with different preprocessing and a file names no "
        "tag; say what yours was trained with: --resize-mode shortest (metaclip_fullcc), or "
        "--resize-mode squash (dfn5b)"
    )
    told = of_file(
        "ViT-H-14-quickgelu", openai=False, overrides=PreprocessOverrides(resize_mode="squash")
    )
    assert (
        "resize_mode" not in told and told["mean"] == of_tag("ViT-H-14-quickgelu", "dfn5b")["mean"]
    )


def test_openais_archive_says_itself_what_it_is() -> None:
    assert "ViT-L-14" not in ALIKE
    assert of_file("ViT-L-14", openai=True, overrides=NONE) == of_tag("ViT-L-14", "openai")
    assert of_file("ViT-B-16-SigLIP", openai=True, overrides=NONE) == {}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Two tags of a small model in place of open_clip's registry."""
    tags: dict[str, dict[str, Any]] = {
        "one": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5], "resize_mode": "squash"},
        "two": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5], "resize_mode": "squash"},
    }
    stand_in = SimpleNamespace(
        list_pretrained_tags_by_model=lambda name: list(tags),
        get_pretrained_cfg=lambda name, tag: tags.get(tag, {}),
        get_model_config=lambda name: small_config(),
    )
    for name, value in vars(stand_in).items():
        monkeypatch.setattr(open_clip, name, value)
    return tags


def weights(folder: Path) -> str:
    torch.save(small_model().state_dict(), folder / "weights.pt")
    return str(folder / "weights.pt")


def test_a_local_checkpoint_of_a_registry_model(
    registry: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    model = clip.load("small", weights(tmp_path))
    assert model.preprocess["mean"] == (0.5, 0.5, 0.5)
    assert model.preprocess["std"] == (0.25, 0.5, 0.5)
    assert model.preprocess["resize_mode"] == "squash"
    assert describe(model.preprocess) == (
        "16x24 pixels, resize squash, bicubic, mean 0.5 0.5 0.5, std 0.25 0.5 0.5"
    )
    said = PreprocessOverrides(mean=(0.1, 0.2, 0.3), interpolation="bilinear")
    model = clip.load("small", weights(tmp_path), preprocess=said)
    assert model.preprocess["mean"] == (0.1, 0.2, 0.3)
    assert model.preprocess["interpolation"] == "bilinear"
    assert model.preprocess["std"] == (0.25, 0.5, 0.5)


def test_a_local_checkpoint_whose_tags_differ(
    registry: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    registry["two"]["mean"] = [0.0, 0.0, 0.0]
    with pytest.raises(ModelError, match=r"--image-mean 0.5 0.5 0.5 \(one\), or --image-mean 0.0"):
        clip.load("small", weights(tmp_path))
    said = PreprocessOverrides(mean=(0.0, 0.0, 0.0))
    assert clip.load("small", weights(tmp_path), preprocess=said).preprocess["std"][0] == 0.25
    archive = write_openai_archive(tmp_path / "openai.pt", small_model())
    assert clip.load("small", archive).preprocess["resize_mode"] == "shortest"


def test_an_undownloadable_tag_names_the_flags_a_file_would_need(
    registry: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(tag: dict[str, Any]) -> str:
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(ModelError, match=r"as --pretrained FILE$"):
        clip.load("small", "one")
    registry["two"]["resize_mode"] = "longest"
    with pytest.raises(ModelError, match=r"as --pretrained FILE --resize-mode squash$"):
        clip.load("small", "one")
    assert unusual_flags("small", "two") == " --resize-mode longest"


def test_overrides_hold_for_configurations_and_are_refused_for_artifacts(tmp_path: Path) -> None:
    config = write_config(tmp_path / "small.json")
    said = PreprocessOverrides(std=(1.0, 1.0, 1.0))
    assert clip.load(config, weights(tmp_path), preprocess=said).preprocess["std"] == (1, 1, 1)
    (tmp_path / "artifact.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"holds its preprocessing: leave --image-std 1.0 1.0 1.0 out"
    ):
        clip.load(tmp_path, preprocess=said)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"mean": [0.5]}, "image_mean: got [0.5], wanted 3 numbers: R, G, B"),
        ({"mean": [0.5, 0.5, float("nan")]}, "wanted 3 numbers"),
        ({"std": [0.5, 0.5, 0.0]}, "image_std: got [0.5, 0.5, 0.0], wanted numbers above 0"),
        (
            {"resize_mode": "crop"},
            "resize_mode: got 'crop', wanted one of shortest, longest, squash",
        ),
        ({"interpolation": "area"}, "interpolation: got 'area', wanted one of bicubic, bilinear"),
    ],
)
def test_bad_overrides_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        PreprocessOverrides(**values)
    assert problem in str(error.value)


def test_quickgelu_is_taken_where_all_tags_have_it_and_said_where_they_differ(
    registry: dict[str, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry["one"]["quick_gelu"] = True
    model = clip.load("small", weights(tmp_path))
    assert not model.model_config.get("quick_gelu")
    assert [record.getMessage() for record in caplog.records] == [
        "small: computing GELU; weights of the tags one were trained with QuickGELU; if yours is one "
        "of them, use --model small-quickgelu"
    ]
    caplog.clear()
    registry["two"]["quick_gelu"] = True
    assert clip.load("small", weights(tmp_path)).model_config["quick_gelu"] is True
    assert "these weights were trained with QuickGELU" in caplog.text
