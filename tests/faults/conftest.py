"""A small CLIP's files, the processes that use them, and small graphs; made once."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from PIL import Image
from safetensors.torch import save_file
from shard_files import write_tar
from small_clip import small_model, write_config
from torch.fx import GraphModule

import qwt_fx


def noise_image(seed: int) -> bytes:
    """A PNG of seeded noise."""
    values = np.random.default_rng(seed).integers(0, 255, (20, 28, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class ClipFiles:
    """What `quantize` needs: a model, shards, a validation folder."""

    folder: Path

    def words(self, output: Path, *extra: str) -> list[str]:
        """The command line of a whole run, 24 samples, both towers, compensated."""
        f = self.folder
        return [
            "quantize",
            "--quiet",
            *("--model", str(f / "model.json"), "--pretrained", str(f / "model.safetensors")),
            *("--train-data", str(f / "s-{0..1}.tar"), "--calib-samples", "24"),
            *("--batch-size", "8", "--qwt", "--imagenet-val", str(f / "val")),
            *("--output", str(output)),
            *extra,
        ]


@pytest.fixture(scope="session")
def clip_files() -> Iterator[ClipFiles]:
    # Not under pytest's folders: a process without rights must be able to read it.
    folder = Path(tempfile.mkdtemp(prefix="qwt-fx-faults-"))
    folder.chmod(0o755)
    write_config(folder / "model.json")
    save_file(small_model().state_dict(), folder / "model.safetensors")
    for shard in range(2):
        members = []
        for n in range(16 * shard, 16 * (shard + 1)):
            members += [(f"{n:05d}.png", noise_image(n)), (f"{n:05d}.txt", f"number {n}".encode())]
        write_tar(folder / f"s-{shard}.tar", members)
    for name in "ab":
        (folder / "val" / name).mkdir(parents=True)
        for i in range(3):
            (folder / "val" / name / f"{i}.png").write_bytes(noise_image(1000 + i + ord(name)))
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield ClipFiles(folder)
    shutil.rmtree(folder)


class ForkServer:
    """See `fork_server`."""

    def __init__(self, log: Path) -> None:
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, words: list[str], **request: Any) -> int:
        """Run the program; its exit code, negative for the signal that ended it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        line = json.dumps({"words": words, "stderr": str(self.log)} | request)
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        self.answer = json.loads(self._process.stdout.readline())
        return int(self.answer["code"])

    @property
    def said(self) -> str:
        """What the last run wrote."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("program") / "log.txt")
    yield server
    server.close()


@pytest.fixture(scope="session")
def clip_artifact(
    clip_files: ClipFiles, program: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A complete artifact of the small CLIP."""
    folder = tmp_path_factory.mktemp("clip") / "artifact"
    assert program.run(clip_files.words(folder)) == 0, program.said
    return folder


@pytest.fixture(scope="session")
def tower() -> GraphModule:
    """A captured tower of two transformer blocks."""
    return qwt_fx.capture(toys.randomize(toys.Tower(layers=2)), (toys.tokens(3),))
