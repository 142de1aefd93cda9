"""Long runs: neither memory nor file handles grow."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
import toys
from shard_files import pairs, tokenizer, transform, write_tar
from torch.fx import GraphModule

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.data.data import load_calibration

MEGABYTE = 1 << 20


def resident() -> int:
    """Bytes of memory this process has."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def handles() -> int:
    """Open files of this process."""
    return len(os.listdir("/proc/self/fd"))


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc"),
]


def test_200_saves_and_loads_leave_nothing_behind(tower: GraphModule, tmp_path: Path) -> None:
    x = toys.tokens(6)
    q = qwt_fx.quantize(tower, (x,), [x], QuantConfig(recipe="repq-vit"))
    before = (0, 0)
    with torch.no_grad():
        wanted = q(x)
        for cycle in range(200):
            qwt_fx.save(q, tmp_path / "a")
            q = qwt_fx.load(tmp_path / "a")
            assert torch.equal(q(x), wanted)
            if cycle == 20:  # caches are filled
                before = (resident(), handles())
    assert resident() - before[0] < 20 * MEGABYTE
    assert handles() == before[1]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_10000_calibration_images_take_the_memory_of_their_tensors(tmp_path: Path) -> None:
    members = [
        (name.replace(".", f"-{copy}."), data)
        for copy in range(50)
        for name, data in pairs(range(200))
    ]
    shards = [
        write_tar(tmp_path / f"s-{i}.tar", members[i * 5000 : (i + 1) * 5000]) for i in range(4)
    ]
    del members

    def load(samples: int) -> int:
        data = load_calibration(
            "::".join(shards),
            transform=transform,
            tokenizer=tokenizer,
            samples=samples,
            batch_size=128,
        )
        assert (data.samples, data.skipped_samples) == (samples, 0)
        return sum(t.nbytes for batch in data.batches for t in batch)

    load(1000)
    before = (resident(), handles())
    held = load(10_000)
    assert held == 10_000 * (3 * 8 * 8 * 4 + 24 * 8)
    # The tensors are gone; what stays does not depend on how many images there were.
    assert resident() - before[0] < 20 * MEGABYTE
    assert handles() == before[1]
