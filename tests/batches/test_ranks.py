"""Messages between ranks, on threads and queues instead of processes and sockets."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwt_fx.batches import ranks
from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.batches.ranks import Ranks
from qwt_fx.errors import DataError, RankError


class Wire:
    """torch.distributed's send, recv and broadcast among threads; counts what it carries."""

    def __init__(self, world: int) -> None:
        self.world, self.bytes = world, 0
        self.mine = threading.local()
        self._queues = {(a, b): queue.Queue() for a in range(world) for b in range(world)}

    def send(self, data: Tensor, target: int) -> None:
        self.bytes += data.nbytes
        self._queues[self.mine.rank, target].put(data.clone())

    def recv(self, data: Tensor, source: int) -> None:
        found = self._queues[source, self.mine.rank].get(timeout=10)
        if found is None:
            raise RuntimeError("Connection closed by peer")
        assert (found.dtype, found.shape) == (data.dtype, data.shape)
        data.copy_(found)

    def broadcast(self, data: Tensor, source: int) -> None:
        assert source == 0
        if self.mine.rank:
            self.recv(data, 0)
            return
        for target in range(1, self.world):
            self.send(data, target)

    def die(self) -> None:
        """What the others see of a rank that ends."""
        for target in range(self.world):
            self._queues[self.mine.rank, target].put(None)


def run(world: int, work: Callable[[Ranks], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `work` returns, or the error it raises, on each rank."""
    wire = Wire(world)
    monkeypatch.setattr(ranks, "dist", wire)
    found: list[Any] = [None] * world

    def one(rank: int) -> None:
        wire.mine.rank = rank
        among = Ranks(rank, world)
        try:
            found[rank] = work(among)
        except Exception as error:
            wire.die()
            found[rank] = error
        if rank == 0:
            wire.counted = among.wire_bytes

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    if not any(isinstance(f, Exception) for f in found):
        assert wire.counted == wire.bytes  # all that is sent passes the first rank
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("total", [0, 1, 4, 5, 6, 11])
def test_messages_arrive_in_the_order_of_the_batches(
    world: int, total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(among: Ranks) -> list[Any]:
        def of_batch(number: int) -> Iterator[Any]:
            for part in range(number % 3):  # some batches have nothing to say
                yield number, part, torch.full((2, number), part, dtype=torch.float64)

        return list(among.in_order(of_batch(n) for n in among.numbers(total)))

    first, *others = run(world, work, monkeypatch)
    assert [(a, b) for a, b, _ in first] == [(n, p) for n in range(total) for p in range(n % 3)]
    assert all(torch.equal(t, torch.full((2, a), b, dtype=torch.float64)) for a, b, t in first)
    assert others == [[]] * (world - 1)


def test_a_value_of_any_kind_reaches_all(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    value = {
        "numbers": [1, -0.1, float("inf"), None, True, "ü"],
        "tensors": [torch.tensor(3.5), torch.empty(0, 4), torch.tensor([True, False])]
        + [torch.randn(3, 5, generator=generator).to(d) for d in (torch.bfloat16, torch.float64)],
        "view": torch.arange(12).reshape(3, 4).T,
    }

    def work(among: Ranks) -> Any:
        return among.from_first(lambda: value if among.first else pytest.fail("asked of another"))

    for found in run(3, work, monkeypatch):
        assert found["numbers"] == value["numbers"]
        for mine, theirs in zip(value["tensors"], found["tensors"], strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
        assert torch.equal(found["view"], value["view"])


@pytest.mark.parametrize("total", [2, 5, 6])
def test_batches_are_dealt_round(total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [[torch.full((n + 1,), n)] for n in range(total)]
    found = run(2, lambda among: among.deal(items if among.first else []), monkeypatch)
    assert [int(item[0][0]) for item in found[0]] == list(range(0, total, 2))
    assert [int(item[0][0]) for item in found[1]] == list(range(1, total, 2))


def test_a_sum_has_the_bits_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(23, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def work(among: Ranks) -> float:
        total = 0.0
        for value in among.in_order([[float(values[n])] for n in among.numbers(23)]):
            total += value
        return total

    alone = run(1, work, monkeypatch)[0]
    assert all(run(world, work, monkeypatch)[0] == alone for world in (2, 3, 7))
    halves = float(sum(values[::2].tolist()) + sum(values[1::2].tolist()))
    assert halves != alone  # the order does matter


def test_an_error_stays_itself_and_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(among: Ranks) -> None:
        def of_batch(number: int) -> Iterator[int]:
            if number == 1:
                raise DataError("batch 1 is bad")
            yield number

        list(among.in_order(of_batch(n) for n in among.numbers(6)))
        among.barrier()

    first, second, third = run(3, work, monkeypatch)
    assert str(second) == "batch 1 is bad"
    assert isinstance(first, RankError) and "rank 0 of 3 lost rank 1" in str(first)
    assert isinstance(third, RankError) and "lost rank 0" in str(third)


def test_a_bug_in_a_decision_is_no_lost_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(among: Ranks) -> None:
        among.from_first(lambda: torch.zeros(2) @ torch.zeros(3))

    first, second = run(2, work, monkeypatch)
    assert type(first) is RuntimeError
    assert isinstance(second, RankError)


def test_too_few_batches_are_refused() -> None:
    with pytest.raises(DataError, match="2 calibration batches for 3 processes"):
        DistributedBatches([torch.zeros(4, 1)], [4, 4], Ranks(0, 3))


def test_one_process_reports_its_errors_itself() -> None:
    assert Ranks().may_report()
    lost = SimpleNamespace(compare_set=lambda *_: b"1")
    assert not Ranks(0, 2, store=lost).may_report()
    assert Ranks(1, 2, store=lost).may_report()
