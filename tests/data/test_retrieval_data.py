"""Retrieval data: every pair once in order, all captions, bad ones counted; cross-precision figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shard_files import image_bytes, tokenizer, transform, words, write_index, write_tar
from torch import Tensor, nn

from qwt_fx.checkpoint.feature_store import FeatureStore
from qwt_fx.data.retrieval_data import RetrievalReader
from qwt_fx.errors import DataError
from qwt_fx.evaluate.retrieval import CROSS_RECALLS, retrieval_recalls
from qwt_fx.evaluate.retrieval_metrics import PairFeatures, pair_features, retrieval_metrics


def members(values: range) -> list[tuple[str, bytes]]:
    """Image v with the captions "v, first" and "v, second"; every third has them in JSON."""
    found = []
    for v in values:
        captions = [f"{v}, first", f"{v}, second"]
        text = (
            ("json", json.dumps({"captions": captions}))
            if v % 3 == 0
            else ("txt", "\n".join(captions) + "\n\n")
        )
        found += [(f"{v:04d}.png", image_bytes(v)), (f"{v:04d}.{text[0]}", text[1].encode())]
    return found


@pytest.fixture
def spec(tmp_path: Path) -> str:
    write_tar(tmp_path / "a.tar", members(range(20)))
    write_index(str(tmp_path / "a.tar"))
    write_tar(tmp_path / "b.tar", members(range(20, 30)))
    write_tar(tmp_path / "c.tar.gz", members(range(30, 36)), "w:gz")
    return f"{tmp_path}/a.tar::{tmp_path}/b.tar::{tmp_path}/c.tar.gz"


def reader(spec: str, **options: object) -> RetrievalReader:
    return RetrievalReader(spec, transform, tokenizer, **({"batch_size": 8} | options))  # type: ignore[arg-type]


def test_every_pair_comes_once_in_order_with_all_captions(spec: str) -> None:
    batches = list(reader(spec))
    assert [len(batch.images) for batch in batches] == [8, 8, 8, 8, 4]
    values = [int(image[0, 0, 0]) for batch in batches for image in batch.images]
    assert values == list(range(36))
    texts = [words(row) for batch in batches for row in batch.tokens]
    assert texts == [f"{v}, {which}" for v in range(36) for which in ("first", "second")]
    assert all(batch.captions.tolist() == [2] * len(batch.images) for batch in batches)


def test_workers_change_nothing(spec: str) -> None:
    for one, two in zip(reader(spec), reader(spec, workers=2), strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.tokens, two.tokens)


def spoiled(tmp_path: Path, bad: set[int], total: int) -> str:
    files = [
        (name, b"no image" if name.endswith("png") and int(name[:4]) in bad else content)
        for name, content in members(range(total))
    ]
    return write_tar(tmp_path / "spoiled.tar", files)


def test_undecodable_samples_are_skipped_counted_and_said(tmp_path: Path) -> None:
    walk = reader(spoiled(tmp_path, {3, 9}, 30))
    assert sum(len(batch.images) for batch in walk) == 28
    assert (walk.tried, walk.skipped) == (30, 2)
    (note,) = walk.notes()
    assert "2 of 30 samples" in note
    assert "'0003'" in note


def test_too_many_bad_samples_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="4 of 30 samples cannot be decoded"):
        list(reader(spoiled(tmp_path, {3, 9, 11, 12}, 30)))


@pytest.mark.parametrize("text", [b"", b"\n \n", b"\xff\xfe\xff"])
def test_an_image_without_a_caption_is_skipped(tmp_path: Path, text: bytes) -> None:
    files = [*members(range(20)), ("x.png", image_bytes(1)), ("x.txt", text)]
    walk = reader(write_tar(tmp_path / "s.tar", files))
    assert sum(len(batch.images) for batch in walk) == 20
    assert walk.skipped == 1


class Image(nn.Module):
    """A linear map of the image; counts its calls and can stop after some."""

    def __init__(self, seed: int, stop: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(3 * 64, 6, generator=generator)
        self.calls, self.stop = 0, stop

    def forward(self, x: Tensor) -> Tensor:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return torch.sin(x.flatten(1) / 50) @ self.weight


class Text(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = torch.randn(24, 6, generator=torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x.float()) @ self.weight


def models(stop: int | None = None) -> dict[str, dict[str, nn.Module]]:
    return {
        "fp32": {"image": Image(1, stop), "text": Text(2)},
        "quantized": {"image": Image(3), "text": Text(4)},
    }


def test_an_interrupted_walk_goes_on_and_gives_the_same_bits(tmp_path: Path) -> None:
    path = spoiled(tmp_path, {2, 17, 29}, 30)
    whole = pair_features(reader(path), models())
    folder = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        store = FeatureStore.open(folder, {"a": 1}, resume=False)
        pair_features(reader(path), models(stop=2), series=store.series("pairs"))
    again = models()
    store = FeatureStore.open(folder, {"a": 1}, resume=True)
    continued = pair_features(reader(path), again, series=store.series("pairs"))
    assert again["fp32"]["image"].calls == 2  # of 4 batches
    assert continued.skipped == whole.skipped == 3
    assert retrieval_metrics(continued, ("image", "text")) == retrieval_metrics(
        whole, ("image", "text")
    )
    for name in ("fp32", "quantized"):
        assert torch.equal(continued.image[name], whole.image[name])
        assert torch.equal(continued.text[name], whole.text[name])


def test_shared_captions_are_counted_and_have_equal_features(tmp_path: Path) -> None:
    files = [
        (f"{i:02d}.{ext}", image_bytes(i) if ext == "png" else text)
        for i, text in enumerate([b"one\none\nmine", b"two", b"one", b"three", b"two"])
        for ext in ("png", "txt")
    ]
    path = write_tar(tmp_path / "s.tar", files)
    found = pair_features(reader(path, batch_size=2), models())
    assert found.owner.tolist() == [0, 0, 0, 1, 2, 3, 4]
    assert found.first.tolist() == [0, 0, 2, 3, 0, 5, 3]
    # "one" of images 0 (twice) and 2, "two" of 1 and 4.
    assert found.counts() == {
        "images": 5, "texts": 7, "skipped_samples": 0, "shared_captions": 5
    }  # fmt: skip
    assert torch.equal(found.text["fp32"][0], found.text["fp32"][4])


def cross_features() -> PairFeatures:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(40, 6, generator=generator)
    owner = torch.arange(40).repeat_interleave(2)
    text = image[owner] + torch.randn(80, 6, generator=generator)

    def noisy(x: Tensor) -> Tensor:
        return x + 0.5 * torch.randn(x.shape, generator=generator)

    return PairFeatures(
        {"fp32": image, "quantized": noisy(image)},
        {"fp32": text, "quantized": noisy(text)},
        owner,
        torch.arange(80),
        0,
    )


def test_cross_precision_mixes_queries_and_gallery_per_direction() -> None:
    features = cross_features()
    found = retrieval_metrics(features, ("image", "text"))
    image, text, owner = features.image, features.text, features.owner
    quantized_text = retrieval_recalls(image["fp32"], text["quantized"], owner)
    quantized_image = retrieval_recalls(image["quantized"], text["fp32"], owner)
    queries = found["cross_precision"]["quantized_queries"]
    gallery = found["cross_precision"]["fp32_queries"]
    for k in (1, 5, 10):
        key = f"image_retrieval_recall@{k}"  # queries are texts
        assert (queries[key], gallery[key]) == (quantized_text[key], quantized_image[key])
        key = f"text_retrieval_recall@{k}"  # queries are images
        assert (queries[key], gallery[key]) == (quantized_image[key], quantized_text[key])
    nearest = torch.cdist(
        *(torch.nn.functional.normalize(image[name].double()) for name in ("quantized", "fp32"))
    ).argmin(dim=1)
    share = float((nearest == torch.arange(40)).double().mean())
    assert queries["image_self_recall@1"] == pytest.approx(share)
    assert 0.3 < share < 1.0


def test_cross_precision_is_empty_where_a_tower_is_not_quantized() -> None:
    found = retrieval_metrics(cross_features(), ("image",))["cross_precision"]
    missing = {
        side: {key for key, value in figures.items() if value is None}
        for side, figures in found.items()
    }
    in_text = {key for key in CROSS_RECALLS if key.startswith("text_retrieval")}
    in_image = {key for key in CROSS_RECALLS if key.startswith("image_retrieval")}
    assert missing == {
        "quantized_queries": in_image | {"text_self_recall@1"},
        "fp32_queries": in_text | {"text_self_recall@1"},
    }
