"""The processes of one run: the ranks of torch.distributed, or one process alone.

Batch number i lies on rank i mod N. Whatever is summed over batches is sent to the first rank batch by
batch and added there in the order of the batches, so that the sums, and all that follows from them, are
those of one process, bit for bit. What is decided from sums is decided on the first rank and sent to
all others. docs/distributed.md has the cost.

With one process nothing is sent and nothing waits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from qwt_fx.errors import ConfigError, RankError

# A rank that is silent for so long is taken for dead. Its longest silence is a layer's solve.
TIMEOUT = timedelta(minutes=30)
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAILED = "qwt_fx/failed"
_TENSOR = "tensor"  # marks a tensor's place in a message's JSON

# None, bool, int, float, str, Tensor, and lists and string-keyed dictionaries of these.
Message = Any


class Ranks:
    """This process among the others.

    Attributes:
        rank, world: 0 <= rank < world.
        device: where received tensors are put whose sender had them on a GPU.
        wire_bytes: bytes of messages that this rank has sent and received; a broadcast counts once for
            each receiver. On the first rank, that of the whole run: nothing passes it by.
    """

    def __init__(
        self, rank: int = 0, world: int = 1, device: str = "cpu", store: Any = None
    ) -> None:
        self.rank, self.world, self.device = rank, world, device
        self.wire_bytes = 0
        self._store = store

    @property
    def first(self) -> bool:
        """Whether this is the rank that adds, decides and writes."""
        return self.rank == 0

    def numbers(self, total: int) -> range:
        """Which of `total` batches lie on this rank."""
        return range(self.rank, total, self.world)

    def in_order(self, items: Iterable[Iterable[Message]]) -> Iterator[Message]:
        """On the first rank, the messages of every batch in the order of the batches; else none.

        items: for each of this rank's batches, in order, its messages. All ranks must call this, the
        others by exhausting the iterator.
        """
        if not self.first:
            for item in items:
                for message in list(item):  # computed while the first rank is at its own
                    self._send(0, [message])
                self._send(0, [])
            self._send(0, None)
            return
        running = set(range(1, self.world))
        for item in items:
            yield from item
            for source in sorted(running):
                ended = yield from self._item_of(source)
                if ended:
                    running.discard(source)
        for source in sorted(running):
            ended = yield from self._item_of(source)
            assert ended  # rank 0 has at least as many batches as any other

    def _item_of(self, source: int) -> Generator[Message, None, bool]:
        """The messages of a rank's next batch; returns whether it has none left."""
        while (message := self._receive(source)) is not None:
            if not message:
                return False
            yield message[0]
        return True

    def from_first(self, make: Callable[[], Message]) -> Message:
        """What `make` returns on the first rank, where alone it is called; tuples become lists."""
        if self.world == 1:
            return make()
        if self.first:
            text, tensors = _pack(made := make())
            with self._talking("another rank"):
                for data in (torch.tensor([len(text)]), _bytes_of(text), *map(_raw, tensors)):
                    self._broadcast(data)
            return made
        with self._talking("rank 0"):
            length = torch.zeros(1, dtype=torch.int64)
            self._broadcast(length)
            header = torch.empty(int(length), dtype=torch.uint8)
            self._broadcast(header)
            return self._unpack(header, self._broadcast)

    def deal(self, items: Sequence[Message]) -> list[Message]:
        """Those of the first rank's items whose numbers lie on this rank."""
        count = self.from_first(lambda: len(items))
        for number in range(count if self.first else 0):
            if number % self.world:
                self._send(number % self.world, items[number])
        if self.first:
            return [items[number] for number in self.numbers(count)]
        return [self._receive(0) for _ in self.numbers(count)]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        for _ in self.in_order([[]]):
            pass
        self.from_first(lambda: None)

    def may_report(self) -> bool:
        """Whether this rank is the first to report why the run ends: an error is said once."""
        if self._store is None:
            return True
        try:
            return bool(self._store.compare_set(_FAILED, "", str(self.rank)) == b"%d" % self.rank)
        except RuntimeError:  # the store went with the rank that held it
            return True

    def _send(self, target: int, message: Message) -> None:
        with self._talking(f"rank {target}"):
            text, tensors = _pack(message)
            for data in (torch.tensor([len(text)]), _bytes_of(text), *map(_raw, tensors)):
                if data.numel():
                    dist.send(data, target)
                    self.wire_bytes += data.nbytes

    def _receive(self, source: int) -> Message:
        def fill(data: Tensor) -> None:
            if data.numel():
                dist.recv(data, source)
                self.wire_bytes += data.nbytes

        with self._talking(f"rank {source}"):
            length = torch.zeros(1, dtype=torch.int64)
            fill(length)
            header = torch.empty(int(length), dtype=torch.uint8)
            fill(header)
            return self._unpack(header, fill)

    def _broadcast(self, data: Tensor) -> None:
        if data.numel():
            dist.broadcast(data, 0)
            self.wire_bytes += data.nbytes * (self.world - 1 if self.first else 1)

    def _unpack(self, header: Tensor, fill: Callable[[Tensor], None]) -> Message:
        def filled(kind: str, shape: list[int], on_gpu: bool) -> Tensor:
            dtype: torch.dtype = getattr(torch, kind)
            where = self.device if on_gpu else "cpu"
            tensor = torch.empty(shape, dtype=dtype, device=where)
            fill(_raw(tensor))
            return tensor

        def restored(value: Any) -> Message:
            if isinstance(value, list):
                return [restored(v) for v in value]
            if isinstance(value, dict):
                if _TENSOR in value:
                    return filled(*value[_TENSOR])
                return {k: restored(v) for k, v in value.items()}
            return value

        return restored(json.loads(header.numpy().tobytes()))

    @contextmanager
    def _talking(self, peer: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
            cause = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise RankError(
                f"rank {self.rank} of {self.world} lost {peer}: it has ended, was killed (out of "
                f"memory?) or was silent for {TIMEOUT.seconds // 60} minutes; no output was written "
                f"({cause})"
            ) from error


def _pack(message: Message) -> tuple[bytes, list[Tensor]]:
    """A message as JSON, and its tensors in the order in which they stand there."""
    tensors: list[Tensor] = []

    def plain(value: Message) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            kind = str(value.dtype).removeprefix("torch.")
            return {_TENSOR: [kind, list(value.shape), value.is_cuda]}
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value

    return json.dumps(plain(message)).encode(), tensors


def _bytes_of(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _raw(tensor: Tensor) -> Tensor:
    """A tensor's bytes, (n,) uint8; a view where it is contiguous, as a fresh one is."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


_current = Ranks()


def current() -> Ranks:
    """This process among the others, as `join` found it; alone before that."""
    return _current


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, started this process as one of several."""
    return all(name in os.environ for name in _VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def launched_first() -> bool:
    """Whether this process is the one that speaks, known before the ranks have met."""
    return not launched() or os.environ["RANK"] == "0"


def local_rank() -> int:
    """The number of this process on its machine; 0 for one started alone."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def join(device: str = "cpu") -> Ranks:
    """Meet the other ranks; returns `Ranks()` where this process was started alone.

    device: "cpu" (gloo) or this rank's own "cuda:N" (nccl; gloo carries what is on the CPU).

    Raises `ConfigError` for variables that are no rank, `RankError` where the others do not come.
    """
    global _current
    if not launched():
        return _current
    try:
        given = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        raise ConfigError(f"{', '.join(_VARIABLES)}: not as torchrun sets them") from None
    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, world = next(iter(rendezvous("env://", *given, timeout=TIMEOUT)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"the {given[1]} ranks did not meet: {str(error).splitlines()[0]}"
        ) from error
    _current = Ranks(rank, world, device, store)
    return _current


def leave() -> None:
    """Wait for the others at the end of a run that succeeded, and part."""
    global _current
    if _current.world > 1:
        _current.barrier()
        dist.destroy_process_group()
    _current = Ranks()
