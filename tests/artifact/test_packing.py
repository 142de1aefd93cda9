from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwt_fx.artifact import packing
from qwt_fx.artifact.packing import pack, packed_size, unpack
from qwt_fx.errors import ArtifactError


def test_the_bit_order_is_the_documented_one() -> None:
    codes = torch.tensor([0b001, 0b010, 0b111, 0b100], dtype=torch.uint8)
    # Stream, first bit first: 100 010 111 001 -> bytes 0b11010001, 0b00001001... by hand:
    # bits 0..7 = 1,0,0,0,1,0,1,1 -> 0xd1; bits 8..11 = 1,0,0,1 -> 0x09.
    assert pack(codes, 3).tolist() == [0xD1, 0x09]


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 7), st.lists(st.integers(0, 127), max_size=70))
def test_packing_agrees_with_numpy_and_round_trips(bits: int, values: list[int]) -> None:
    codes = np.array([v % 2**bits for v in values], dtype=np.uint8)
    packed = pack(torch.from_numpy(codes), bits)
    stream = np.unpackbits(codes[:, None], axis=1, bitorder="little")[:, :bits].reshape(-1)
    assert packed.numpy().tolist() == np.packbits(stream, bitorder="little").tolist()
    assert packed.numel() == packed_size(len(values), bits)
    assert unpack(packed, bits, [len(values)]).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7, 5), (2, 3, 5, 7)])
def test_every_shape_round_trips(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    back = unpack(pack(codes, bits), bits, shape)
    assert back.shape == codes.shape and torch.equal(back, codes)


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("count", [7, 8, 9, 16, 17, 40])
def test_chunks_join_without_a_seam(bits: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
    whole = pack(codes, bits)
    monkeypatch.setattr(packing, "_CHUNK", 8)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, [count]), codes)


def test_a_transposed_tensor_is_packed_in_its_own_order() -> None:
    codes = torch.arange(6, dtype=torch.uint8).reshape(2, 3).t()
    assert torch.equal(unpack(pack(codes, 3), 3, (3, 2)), codes)


@pytest.mark.parametrize("bits", [-1, 0, 1, 8, 9, True, 4.0, "4", None])
def test_other_widths_are_refused(bits: object) -> None:
    with pytest.raises(ArtifactError, match=r"wanted 2\.\.7"):
        pack(torch.zeros(3, dtype=torch.uint8), bits)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=r"wanted 2\.\.7"):
        unpack(torch.zeros(3, dtype=torch.uint8), bits, [3])  # type: ignore[arg-type]


def test_a_code_that_needs_more_bits_is_refused() -> None:
    with pytest.raises(ArtifactError, match="code 16 does not fit 4 bits"):
        pack(torch.tensor([3, 16], dtype=torch.uint8), 4)


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"int64, wanted uint8"):
        pack(torch.tensor([3]), 4)
    with pytest.raises(ArtifactError, match="wanted uint8 of 1"):
        unpack(torch.zeros(2, 2, dtype=torch.uint8), 4, [8])


@pytest.mark.parametrize("shape", [[5], [2], [2, 3], [10**30], [-4], [True, 4], [4.0]])
def test_a_shape_that_does_not_fit_is_refused(shape: list[int]) -> None:
    with pytest.raises(ArtifactError, match="unpacking"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, shape)


def test_fill_bits_must_be_zero() -> None:
    with pytest.raises(ArtifactError, match="fill bits"):
        unpack(torch.tensor([0b1000_0000], dtype=torch.uint8), 7, [1])
