"""Batches of embeddings on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwt_fx.checkpoint.feature_store import FeatureStore, Series
from qwt_fx.errors import OutputError
from qwt_fx.evaluate.evaluate import image_features

RUN = {"model": "m", "data": {"val": "abc"}}


def test_series_come_back_whole_and_apart(tmp_path: Path) -> None:
    store = FeatureStore.open(tmp_path / "s", RUN, resume=False)
    for name, sizes in (("a", (3, 2)), ("b", (4,))):
        series = store.series(name)
        for size in sizes:
            series.append({"x": torch.rand(size, 2), "y": torch.arange(size)})
        before = series.stacked()
        again = FeatureStore.open(tmp_path / "s", RUN, resume=True).series(name)
        assert (len(again), again.rows) == (len(sizes), sum(sizes))
        for key, value in again.stacked().items():
            assert torch.equal(value, before[key])


def test_without_resume_earlier_batches_go(tmp_path: Path) -> None:
    FeatureStore.open(tmp_path / "s", RUN, resume=False).series("a").append({"x": torch.ones(1)})
    store = FeatureStore.open(tmp_path / "s", RUN, resume=False)
    assert len(store.series("a")) == 0
    store.remove()
    assert not (tmp_path / "s").exists()


def test_another_run_is_refused_by_the_setting_that_differs(tmp_path: Path) -> None:
    FeatureStore.open(tmp_path / "s", RUN, resume=False)
    with pytest.raises(OutputError, match="model is 'n', there it was 'm'"):
        FeatureStore.open(tmp_path / "s", RUN | {"model": "n"}, resume=True)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "notes.txt").write_text("keep")
    for resume in (False, True):
        with pytest.raises(OutputError, match="in the way"):
            FeatureStore.open(tmp_path / "s", RUN, resume=resume)
    assert (tmp_path / "s" / "notes.txt").read_text() == "keep"


def test_a_failure_keeps_what_there_is_and_nothing_is_no_folder(tmp_path: Path) -> None:
    for batches, kept in ((0, False), (1, True)):
        with (
            pytest.raises(ZeroDivisionError),
            FeatureStore.open(tmp_path / "s", RUN, resume=False) as store,
        ):
            for _ in range(batches):
                store.series("a").append({"x": torch.ones(1)})
            raise ZeroDivisionError
        assert (tmp_path / "s").exists() == kept
    with FeatureStore.open(tmp_path / "s", RUN, resume=True) as store:
        assert len(store.series("a")) == 1
    assert not (tmp_path / "s").exists()


def test_a_damaged_batch_is_named(tmp_path: Path) -> None:
    store = FeatureStore.open(tmp_path / "s", RUN, resume=False)
    store.series("a").append({"x": torch.ones(1)})
    (batch,) = (tmp_path / "s").glob("a-000000-*.safetensors")
    batch.write_bytes(b"x")
    with pytest.raises(OutputError, match=r"a-000000-\w{64}\.safetensors: damaged"):
        store.series("a")


def test_embedding_goes_on_behind_the_kept_batches() -> None:
    batches = [(torch.full((2, 3), float(i)), torch.tensor([i, i])) for i in range(4)]
    series = Series(None, "images")
    series.append({"features": torch.full((2, 3), -1.0), "labels": torch.tensor([9, 9])})
    features, labels = image_features(torch.nn.Identity(), batches, series=series)
    assert labels.tolist() == [9, 9, 1, 1, 2, 2, 3, 3]
    assert features[:, 0].tolist() == [-1, -1, 1, 1, 2, 2, 3, 3]
