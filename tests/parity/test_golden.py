"""`--recipe repq-vit --compat original` against the outputs of the published code.

Reads every golden file in the folder that QWT_FX_GOLDEN names (see tests/golden/README.md), so
that other bit widths can be dropped in; a committed subset always runs.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from golden_files import ATTENTION_FILE, CLIP_FILE, golden_id, is_full, list_files
from golden_run import NUDGES, golden, setting_of, values
from torch import Tensor

SCALE_TOLERANCE = 1e-4
OUTPUT_TOLERANCE = 0.1  # of the original's own quantization error

CLIP_FILES = list_files(CLIP_FILE)
ATTENTION_FILES = list_files(ATTENTION_FILE)
# TorchDynamo's capture is checked on the files with QwT, whose figures include all the others'.
STRICT_FILES = [p for p in CLIP_FILES if p.stem.endswith("_qwt")] + ATTENTION_FILES


def _parameters(files: list[Path]) -> list[object]:
    traced = [pytest.param(p, False, id=golden_id(p)) for p in files]
    strict = [p for p in files if p in STRICT_FILES]
    return traced + [pytest.param(p, True, id=f"strict_{golden_id(p)}") for p in strict]


clip_files = pytest.mark.parametrize(("path", "strict"), _parameters(CLIP_FILES))
full_files = pytest.mark.parametrize("path", [p for p in CLIP_FILES if is_full(p)], ids=golden_id)


def _distance(path: Path, key: str, ours: Tensor, theirs: Tensor) -> float:
    """How far a figure lies from another run's, in the unit of its strict tolerance."""
    kind = _kind(key)
    difference = (ours.float() - theirs.float().reshape(ours.shape)).abs()
    if kind == "delta":
        return float((difference / theirs.reshape(ours.shape)).max())
    if kind == "reparam":
        return float((difference / (theirs.abs() + 1.0)).max())
    if kind == "quant":
        exact = golden(path)[key.replace("quant.", "fp32.", 1)]
        return float(difference.norm() / (golden(path)[key] - exact).norm())
    if kind in ("zero_point", "r2"):
        return float(difference.max())
    return float(difference.norm() / theirs.norm())


STRICT = {
    "delta": SCALE_TOLERANCE,
    "zero_point": SCALE_TOLERANCE * 255,
    "reparam": 1e-5,
    "quant": OUTPUT_TOLERANCE,
    "r2": 2e-3,
    "W": 1e-3,
    "b": 1e-3,
    "block": 1e-3,
    "classifier": 5e-2,
    "logits": 5e-2,
}


def _kind(key: str) -> str:
    if key.startswith("quant.block"):  # the attention files have no FP32 blocks to compare with
        return "block"
    if key.endswith("class_logits"):
        return "logits"
    if key.startswith(("quant.", "reparam.", "classifier.")):
        return key.split(".")[0]
    return key.rsplit(".", 1)[1]


def _place(key: str) -> tuple[str, int]:
    """(tower, block) of a figure; the patch convolution is before block 0, features behind all."""
    text = bool(re.search(r"(^|\.)(transformer|text)\.|text_features", key))
    tower = "text" if text and "visual" not in key else "visual"
    block = re.search(r"resblocks\.(\d+)|block(\d+)|qwt\.\w+\.(\d+)", key)
    if block is not None:
        return tower, int(next(g for g in block.groups() if g))
    return tower, -1 if "conv1" in key else 99


@cache
def _moves(path: Path) -> dict[str, float]:
    """How far a last-bit change of the weights moves each figure, at most."""
    base, moved = values(path), dict.fromkeys(values(path), 0.0)
    for nudge in range(1, NUDGES + 1):
        for key, value in values(path, nudge=nudge).items():
            if key in golden(path) and key in base:
                moved[key] = max(moved[key], _distance(path, key, value, base[key]))
    return moved


def _noise(path: Path, key: str) -> float:
    """How far a last-bit change moves figures of this kind, up to this one's block."""
    tower, block = _place(key)
    alike = {k: m for k, m in _moves(path).items() if _kind(k) == _kind(key)}
    return max(m for k, m in alike.items() if _place(k)[0] == tower and _place(k)[1] <= block)


def _assert_equals_original(path: Path, strict: bool, pattern: str) -> int:
    """Compare every figure whose key matches; returns how many there were."""
    checked = 0
    for key, ours in values(path, strict).items():
        if not re.match(pattern, key) or key not in golden(path):
            continue
        distance, limit = _distance(path, key, ours, golden(path)[key]), STRICT[_kind(key)]
        if distance > limit:
            limit = _noise(path, key)
        assert distance <= limit, f"{key}: {distance:.3g} from the original, allowed {limit:.3g}"
        checked += 1
    return checked


def test_golden_files_were_found() -> None:
    assert CLIP_FILES
    assert ATTENTION_FILES


@clip_files
def test_scales_and_zero_points_equal_the_original_ones(path: Path, strict: bool) -> None:
    # 3 blocks x 4 linears x (input, weight) and the patch convolution, each a scale and a zero.
    wanted = sum(2 * (26 if tower == "visual" else 24) for tower in setting_of(path).towers)
    pattern = r"init\.(?!classifier)|final\."
    assert _assert_equals_original(path, strict, pattern) == 2 * wanted


@clip_files
def test_before_the_first_block_ends_the_strict_tolerance_holds(path: Path, strict: bool) -> None:
    """No rounding can excuse a difference where nothing was quantized before."""
    ours, checked = values(path, strict), 0
    for key in ours:
        first = re.search(r"conv1|resblocks\.0\.attn\.qkv\.(input|weight)_quantizer", key)
        if key.startswith("init.") and first is not None and key in golden(path):
            distance = _distance(path, key, ours[key], golden(path)[key])
            assert distance <= STRICT[_kind(key)], f"{key}: {distance:.3g}"
            checked += 1
    assert checked >= 4


@clip_files
def test_reparameterized_tensors_equal_the_original_ones(path: Path, strict: bool) -> None:
    # 3 blocks x (2 norms + 2 linears) x (weight, bias)
    wanted = 24 * len(setting_of(path).towers) if is_full(path) else 2
    assert _assert_equals_original(path, strict, r"reparam\.") == wanted


@clip_files
def test_outputs_equal_the_original_ones(path: Path, strict: bool) -> None:
    wanted = (4 if is_full(path) else 2) * len(setting_of(path).towers)
    assert _assert_equals_original(path, strict, r"quant\.(?!class_logits)") == wanted


@clip_files
def test_compensations_equal_the_original_ones(path: Path, strict: bool) -> None:
    found = values(path, strict)
    if not path.stem.endswith("_qwt"):
        assert not [key for key in found if key.startswith("qwt.")]
        return
    scores = {k: float(v) for k, v in golden(path).items() if re.fullmatch(r"qwt\..*\.r2", k)}
    assert len(scores) == 3 * len(setting_of(path).towers)
    for key, score in scores.items():
        assert (key.replace(".r2", ".W") in found) == (score > 0.0), key
    wanted = sum(3 if score > 0.0 else 1 for score in scores.values())
    assert _assert_equals_original(path, strict, r"qwt\.") == wanted


@full_files
def test_classifier_equals_the_original_one(path: Path) -> None:
    wanted = 3 if setting_of(path).choice == "image_only" else 2
    pattern = r"classifier\.|init\.classifier|quant\.class_logits"
    assert _assert_equals_original(path, False, pattern) == wanted
    original = golden(path)["quant.class_logits"].argmax(1)
    chosen = [values(path, nudge=n)["quant.class_logits"].argmax(1) for n in range(NUDGES + 1)]
    differ = [int((c != original).sum()) for c in chosen]
    unstable = max(int((c != chosen[0]).sum()) for c in chosen)
    assert differ[0] <= unstable


@pytest.mark.parametrize(("path", "strict"), _parameters(ATTENTION_FILES))
def test_quantized_attention_equals_the_original_one(path: Path, strict: bool) -> None:
    # Per block: q, k and v with a scale and a zero, the softmax with a scale.
    pattern = r"final\..*\.matmul\d\.quantizer_[AB]\."
    assert _assert_equals_original(path, strict, pattern) == 21
    wanted = 4 if is_full(path) else 1  # the features and 3 blocks
    assert _assert_equals_original(path, strict, r"quant\.(features|block\d\.out)") == wanted


def test_a_wrong_range_is_told_from_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allowance for rounding must not hide a mistake: here, min-max instead of percentiles."""
    path = next(p for p in CLIP_FILES if not is_full(p))
    monkeypatch.setattr("qwt_fx.numerics.percentile_search.PERCENTILES", (0.9, 0.99))
    values.cache_clear()
    try:
        with pytest.raises(AssertionError, match="from the original"):
            _assert_equals_original(path, False, r"init\.")
    finally:
        values.cache_clear()
    assert torch.isfinite(values(path)["quant.image_features"]).all()
