"""Small shards, images and a model's two inputs, for the tests of the data modules."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwt_fx.data.samples import ScanCounts
from qwt_fx.data.shard_index import SCHEMA, index_path
from qwt_fx.data.tar_shard import groups

CONTEXT = 24

Member = tuple[str, bytes]


def image_bytes(value: int, format: str = "PNG", size: tuple[int, int] = (10, 12)) -> bytes:
    """A grey image whose every pixel is `value`."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, format)
    return buffer.getvalue()


def pairs(values: Iterable[int]) -> list[Member]:
    """A grey image and its caption "number v" for each value."""
    return [
        member
        for v in values
        for member in ((f"{v:06d}.png", image_bytes(v)), (f"{v:06d}.txt", f"number {v}".encode()))
    ]


def write_tar(path: Path, members: Iterable[Member], mode: str = "w") -> str:
    """Write members in order; `mode` "w:gz" compresses."""
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def write_sparse_shard(path: Path, samples: int, image_size: int) -> str:
    """A tar whose images are holes in the file: large, and written at once."""
    with path.open("wb") as file:
        for i in range(samples):
            for extension, size in (("jpg", image_size), ("txt", 10)):
                info = tarfile.TarInfo(f"{i:09d}.{extension}")
                info.size = size
                file.write(info.tobuf())
                file.seek(-(-size // 512) * 512, io.SEEK_CUR)
        file.write(b"\0" * 1024)
    return str(path)


def write_index(shard: str) -> None:
    """Walk the tar `shard` once and write its index beside it."""
    samples = [
        {"key": key, "files": {ext: list(span) for ext, span in files.items()}}
        for key, files in groups(shard, ScanCounts())
    ]
    index = {"schema": SCHEMA, "size": Path(shard).stat().st_size, "samples": samples}
    Path(index_path(shard)).write_text(json.dumps(index), encoding="utf-8")


def transform(image: Image.Image) -> Tensor:
    """(3, 8, 8) float32 of the image's values."""
    return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1).float()


def tokenizer(texts: list[str]) -> Tensor:
    """(B, CONTEXT) int64: the bytes of each text, then zeros."""
    rows = [list(text.encode()[:CONTEXT]) for text in texts]
    return torch.tensor([row + [0] * (CONTEXT - len(row)) for row in rows])


def words(row: Tensor) -> str:
    """The text that `tokenizer` made `row` from."""
    return bytes(int(i) for i in row if i).decode()
