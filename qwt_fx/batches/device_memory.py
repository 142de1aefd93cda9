"""What happens when a device has too little memory: smaller batches, said aloud, or a clear error.

An embedding depends on its own sample alone, so halves of a batch give the same features up to rounding.
Calibration sums over batches: smaller ones give the same statistics up to the order of additions, but
what is found from the first batch alone then sees less of it; the message says so.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from qwt_fx.batches.batch import Batch, as_inputs, batch_size
from qwt_fx.errors import DataError, first_line

log = logging.getLogger(__name__)
Result = TypeVar("Result")


def embed(tower: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """`tower(inputs)`, in smaller parts where the device cannot hold all at once.

    Args:
        tower: maps (n, ...) to features (n, e).
        inputs: (n, ...), n at least 1.

    Returns features (n, e). Raises `DataError` when one sample alone is too much.
    """
    size = len(inputs)
    while True:
        try:
            return torch.cat([tower(part) for part in torch.split(inputs, size)])
        except torch.OutOfMemoryError as error:
            reason = first_line(error)
        # Outside the handler: the traceback held on to the failed call's tensors.
        size = _halved(size, reason, inputs.device)


def with_smaller_batches(
    batches: Sequence[Batch], run: Callable[[Sequence[Batch]], Result]
) -> Result:
    """`run(batches)`; on a device out of memory once more from the start, with batches of half the size.

    Raises `DataError` when batches of one sample are too much.
    """
    tried, size = batches, 0
    while True:
        try:
            return run(tried)
        except torch.OutOfMemoryError as error:
            reason = first_line(error)
        largest = size or max(map(batch_size, batches))
        size = _halved(largest, reason, as_inputs(batches[0])[0].device)
        log.warning(
            "calibration begins anew with batches of %d; what only the first batch decides sees "
            "fewer samples",
            size,
        )
        tried = [part for batch in batches for part in _split(batch, size)]


def _split(batch: Batch, size: int) -> list[Batch]:
    return list(zip(*(torch.split(tensor, size) for tensor in as_inputs(batch)), strict=True))


def _halved(size: int, reason: str, device: torch.device) -> int:
    if size == 1:
        raise DataError(
            f"out of memory on {device} with a single sample: {reason}; free the device, or take "
            "--device cpu"
        )
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    half = (size + 1) // 2
    log.warning("out of memory on %s with %d samples at once: trying %d", device, size, half)
    return half
