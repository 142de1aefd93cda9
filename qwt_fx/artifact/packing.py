"""Packs sub-8-bit integers into a bit stream.

Code i occupies bits [i * b, (i + 1) * b) of the stream; bit j of the stream is bit j % 8, least
significant first, of byte j // 8. The last byte is filled with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qwt_fx.errors import ArtifactError

MIN_BITS, MAX_BITS = 2, 7
_MAX_ELEMENTS = 1 << 40
_CHUNK = 1 << 20  # codes expanded to bits at a time; a multiple of 8, so chunks end on a byte


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def _require_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ArtifactError(f"packing: got {bits!r} bits, wanted {MIN_BITS}..{MAX_BITS}")


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes of any shape, each below 2^bits, into a uint8 vector (packed_size,) on CPU.

    Raises `ArtifactError` for another dtype, bits outside 2..7 or a code that needs more bits.
    """
    _require_bits(bits)
    if codes.dtype is not torch.uint8:
        raise ArtifactError(f"packing: got {codes.dtype}, wanted uint8 codes")
    flat = codes.detach().cpu().reshape(-1)
    if flat.numel() and int(flat.max()) >= 2**bits:
        raise ArtifactError(f"packing: code {int(flat.max())} does not fit {bits} bits")
    shifts = torch.arange(bits, dtype=torch.uint8)
    weights = (2 ** torch.arange(8)).to(torch.uint8)
    parts = []
    for begin in range(0, flat.numel(), _CHUNK):
        stream = ((flat[begin : begin + _CHUNK, None] >> shifts) & 1).reshape(-1)
        missing = -stream.numel() % 8
        stream = torch.cat([stream, stream.new_zeros(missing)]) if missing else stream
        parts.append((stream.reshape(-1, 8) * weights).sum(dim=1, dtype=torch.uint8))
    return torch.cat(parts) if parts else flat.new_empty(0)


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """uint8 codes of this shape from a packed vector.

    Raises `ArtifactError` for bits outside 2..7, a malformed shape, another dtype than uint8, a
    wrong size, or fill bits that are not zero (the stream is damaged or was packed otherwise).
    """
    _require_bits(bits)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
        raise ArtifactError(f"unpacking: got the shape {list(shape)}, wanted sizes of at least 0")
    count = math.prod(shape)
    if count > _MAX_ELEMENTS:
        raise ArtifactError(f"unpacking: {count} codes, wanted at most {_MAX_ELEMENTS}")
    if packed.dtype is not torch.uint8 or packed.dim() != 1:
        raise ArtifactError(
            f"unpacking: got {packed.dtype} of {packed.dim()} dimensions, wanted uint8 of 1"
        )
    if packed.numel() != packed_size(count, bits):
        raise ArtifactError(
            f"unpacking: got {packed.numel()} bytes for {count} codes of {bits} bits, "
            f"wanted {packed_size(count, bits)}"
        )
    used = count * bits % 8
    if used and int(packed[-1]) >> used:
        raise ArtifactError("unpacking: the last byte's fill bits are not zero")
    places = torch.arange(8, dtype=torch.uint8)
    weights = (2 ** torch.arange(bits)).to(torch.uint8)
    parts = []
    step = _CHUNK * bits // 8
    for begin in range(0, packed.numel(), step):
        stream = ((packed[begin : begin + step, None] >> places) & 1).reshape(-1)
        whole = stream[: stream.numel() // bits * bits].reshape(-1, bits)
        parts.append((whole * weights).sum(dim=1, dtype=torch.uint8))
    codes = torch.cat(parts)[:count] if parts else packed.new_empty(0)
    return codes.reshape(tuple(shape))
