"""One rule: same seed, machine and threads give the same bits; other threads nearly the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toys
from torch import Tensor
from torch.fx import GraphModule

import qwt_fx
from qwt_fx import QuantConfig


def stored(folder: Path) -> dict[str, bytes]:
    """What was computed: all files but the report, which holds times."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.json"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["best", "repq-vit"])
def test_any_number_of_workers_gives_the_same_artifact(
    program, clip_files, tmp_path: Path, recipe: str
) -> None:
    for name, workers in (("none", 0), ("one", 1), ("two", 2), ("four", 4)):
        words = clip_files.words(tmp_path / name, "--recipe", recipe, "--workers", str(workers))
        assert program.run(words) == 0, program.said
    first = stored(tmp_path / "none")
    assert set(first) >= {"artifact.json", "image.safetensors", "text.safetensors"}
    for name in ("one", "two", "four"):
        assert stored(tmp_path / name) == first, name


@pytest.mark.slow
def test_another_seed_gives_another_artifact(program, clip_files, tmp_path: Path) -> None:
    """Otherwise the tests here would say nothing."""
    for seed in ("1", "2"):
        words = clip_files.words(tmp_path / seed, "--seed", seed)
        assert program.run(words) == 0, program.said
    assert stored(tmp_path / "1") != stored(tmp_path / "2")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["best", "repq-vit"])
def test_thread_counts_hardly_matter(tower: GraphModule, recipe: str) -> None:
    """Scales within 1e-6, outputs within 1 % of the quantization error (method of this project)."""
    x = toys.tokens(24)
    config = QuantConfig(recipe=recipe, compensation="qwt", w_bits=6, a_bits=6)
    threads = torch.get_num_threads()
    found: list[tuple[dict[str, dict[str, tuple[Tensor, ...]]], Tensor]] = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            q = qwt_fx.quantize(tower, (x,), list(x.split(8)), config)
            torch.set_num_threads(1)
            with torch.no_grad():
                found.append((qwt_fx.qparams(q), q(x)))
    finally:
        torch.set_num_threads(threads)
    (one, y_one), (two, y_two) = found
    assert one.keys() == two.keys()
    for layer, sides in one.items():
        for side, (scale, _) in sides.items():
            torch.testing.assert_close(scale, two[layer][side][0], rtol=1e-6, atol=0.0)
    with torch.no_grad():
        error = float((tower(x) - y_one).norm())
    assert float((y_one - y_two).norm()) <= 0.01 * error
