"""Images from bytes, in worker processes, in the order asked for.

What cannot be decoded comes back as `Undecodable`: whether that is an error is the caller's matter.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qwt_fx.data.samples import PairSource
from qwt_fx.errors import DataError

log = logging.getLogger(__name__)

Transform = Callable[[Image.Image], Tensor]
Pixels = NDArray[np.float32]

# The short side is resized to the model's: a 1 x 60,000 image would become gigabytes.
MAX_ASPECT = 200


@dataclass(frozen=True)
class Decoded:
    """A pair ready for the model: `image` (3, H, W) float32, captions, the bytes read for it.

    `caption` is the only one, or the first where all were asked for.

    The image is a numpy array because tensors travel from workers as shared memory, of which
    containers have little, and each holds a file open.
    """

    image: Pixels
    captions: tuple[str, ...]
    bytes_read: int

    @property
    def caption(self) -> str:
        """The first caption; empty where there is none."""
        return self.captions[0] if self.captions else ""


@dataclass(frozen=True)
class Undecodable:
    """A pair that cannot be used: what it is, why, and the bytes read to find out."""

    where: str
    reason: str
    bytes_read: int


def open_image(data: bytes) -> Image.Image:
    """The image in `data`, as RGB of 8 bits; any EXIF rotation is left alone, as open_clip does.

    Raises:
        DataError: more pixels than Pillow's bomb limit, or a shape no transform can take.
        Exception: whatever Pillow raises on damaged data.
    """
    with warnings.catch_warnings():
        # Up to twice its limit Pillow only warns.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image: Image.Image = Image.open(io.BytesIO(data))
    short, long = sorted(image.size)
    if long > MAX_ASPECT * max(short, 1):
        raise DataError(f"image of {image.width} x {image.height}, wanted sides within 1:200")
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB of 8 bits: alpha dropped, grey repeated, of 16 bits the upper 8.

    Raises:
        DataError: floating-point pixels of at most 1, which Pillow would make black.
    """
    if image.mode.startswith("I"):
        # Pillow would clip 16 bits to 255, which turns most such images white.
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray((wide.clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F" and float(np.asarray(image).max(initial=0.0)) <= 1.0:
        raise DataError(
            "image of floating-point pixels of at most 1, wanted 0 to 255: save it with 8 bits"
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_in_order(
    sources: Iterable[PairSource], transform: Transform, workers: int
) -> Generator[Decoded | Undecodable, None, None]:
    """Read and decode `sources`, consumed lazily; results in their order for any `workers`.

    Args:
        sources: pairs; the iterable runs in this process, reading and decoding in the workers.
        transform: PIL RGB image to a (3, H, W) tensor, deterministic.
        workers: processes; 0 decodes in this one.

    Raises:
        DataError: from `sources`, or when a worker process dies.
    """
    # With a generator of its own, the loader leaves the caller's random state alone.
    loader: DataLoader[Decoded | Undecodable] = DataLoader(
        _Decoder(transform),
        batch_size=None,
        sampler=sources,
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(0),
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "worker" not in str(error):
            raise
        raise DataError(
            f"a data worker died ({str(error).splitlines()[0]}); out of memory? "
            "Use fewer --workers, or 0"
        ) from error


class _Decoder(Dataset["Decoded | Undecodable"]):
    """Maps a `PairSource` (not a number: the loader hands on whatever its sampler yields)."""

    def __init__(self, transform: Transform) -> None:
        self._transform = transform

    def __getitem__(self, source: PairSource) -> Decoded | Undecodable:
        bytes_read = 0
        try:
            pair = source.read()
            bytes_read = pair.bytes_read
            image = self._transform(open_image(pair.image))
            if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
                got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise DataError(f"the transform returned {got}, wanted a tensor (3, H, W)")
            return Decoded(image.to(torch.float32).numpy(), pair.captions, bytes_read)
        except MemoryError:
            raise
        # Pillow's decoders raise nearly anything on damaged data (SyntaxError, struct.error, ...).
        except Exception as error:
            log.debug("%s: cannot be decoded", source.where, exc_info=True)
            # Pillow names the buffer by its address, which would differ from run to run.
            text = " ".join(re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "", str(error)).split())
            name = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
            return Undecodable(source.where, (name + text)[:200], bytes_read)


def _as_it_is(sample: Any) -> Any:
    """No collation; a function of the module because it is pickled where workers are spawned."""
    return sample
