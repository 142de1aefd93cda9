"""A device with too little memory: smaller batches, said aloud, or a clear error."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from qwt_fx.batches.device_memory import embed, with_smaller_batches
from qwt_fx.errors import DataError


class SmallDevice:
    """Doubles its input; more than `most` rows at once are too many."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.calls: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return 2 * x


@pytest.mark.parametrize(("rows", "most"), [(7, 7), (7, 3), (8, 1), (1, 1), (9, 8)])
def test_embeddings_are_those_of_the_whole_batch(rows: int, most: int) -> None:
    x = torch.arange(rows * 2.0).reshape(rows, 2)
    device = SmallDevice(most)
    assert torch.equal(embed(device, x), 2 * x)
    assert device.calls[0] == rows


def test_a_smaller_batch_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="qwt_fx"):
        embed(SmallDevice(2), torch.ones(6, 1))
    assert "out of memory on cpu with 6 samples at once: trying 3" in caplog.text
    assert "trying 2" in caplog.text


def test_a_single_sample_that_is_too_much_is_refused() -> None:
    with pytest.raises(DataError, match=r"single sample: CUDA out of memory.*--device cpu"):
        embed(SmallDevice(0), torch.ones(4, 1))


def test_other_errors_are_not_touched() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        embed(broken, torch.ones(4, 1))


def test_calibration_begins_anew_with_halved_batches(caplog: pytest.LogCaptureFixture) -> None:
    batches = [(torch.arange(5.0), torch.arange(5)), (torch.arange(3.0), torch.arange(3))]
    seen: list[list[int]] = []

    def run(tried: list[tuple[Tensor, ...]]) -> Tensor:
        seen.append([len(b[0]) for b in tried])
        if max(seen[-1]) > 2:
            raise torch.OutOfMemoryError("out of memory")
        assert all(torch.equal(a.long(), b) for a, b in tried)
        return torch.cat([b[0] for b in tried])

    with caplog.at_level(logging.WARNING, logger="qwt_fx"):
        found = with_smaller_batches(batches, run)
    assert seen == [[5, 3], [3, 2, 3], [2, 2, 1, 2, 1]]
    assert torch.equal(found, torch.cat([b[0] for b in batches]))
    assert "begins anew with batches of 2" in caplog.text


def test_calibration_that_one_sample_overflows_is_refused() -> None:
    def run(tried: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(DataError, match="with a single sample"):
        with_smaller_batches([(torch.ones(2),)], run)
