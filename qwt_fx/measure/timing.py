"""Latency of several functions in one run: interleaved rounds, so that a busy moment of the machine
falls on all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Timed = Callable[[], object]


@dataclass(frozen=True)
class Latency:
    """Seconds a call took, one entry a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def p90(self) -> float:
        """The smallest time that at least nine calls of ten kept to, in seconds."""
        return sorted(self.seconds)[math.ceil(0.9 * len(self.seconds)) - 1]


# Seconds between two functions. Threads of a runtime go on spinning for some milliseconds after its
# call, on cores that the next function needs.
PAUSE = 0.1


def interleaved(
    functions: Mapping[str, Timed], rounds: int, warm_up: int, *, pause: float = PAUSE
) -> dict[str, Latency]:
    """Time each function once a round, after `warm_up` rounds that do not count.

    Every second round runs backwards: what a function leaves in the caches meets both neighbours.
    `pause`: seconds before each function's turn, which begins with a call that does not count: it
    wakes the runtime's threads and brings its weights back into the caches, as in a busy server.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for number in range(-warm_up, rounds):
        for name in names if number % 2 == 0 else reversed(names):
            time.sleep(pause)
            functions[name]()
            begun = time.perf_counter()
            functions[name]()
            elapsed = time.perf_counter() - begun
            if number >= 0:
                seconds[name].append(elapsed)
    return {name: Latency(tuple(values)) for name, values in seconds.items()}
