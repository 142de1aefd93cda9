"""Weights for CPUs that add two products in int16: the bound, its proof by brute force, the split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwt_fx.backends.x86.packed_weight import PREPACK, PackedWeight
from qwt_fx.backends.x86.saturation import QLINEAR, fits_int16, saturates, split

CODES = (255, 127, 63, 15)


def product(codes: Tensor, weight: Tensor) -> Tensor:
    """What the kernel computes, as integers."""
    outer = len(weight)
    packed = PREPACK(weight, None)
    ones, zeros = torch.ones(outer), torch.zeros(outer, dtype=torch.int32)
    return QLINEAR(
        codes, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    ).long()


def exact(codes: Tensor, weight: Tensor) -> Tensor:
    return codes.long() @ weight.long().T


def worst_pairs(weight: Tensor, largest: int) -> tuple[int, int]:
    """The smallest and largest sum of two products that any codes and any two positions give."""
    low = high = 0
    for row in weight.tolist():
        for i, first in enumerate(row):
            for second in row[i + 1 :]:
                high = max(high, largest * (max(first, 0) + max(second, 0)))
                low = min(low, largest * (min(first, 0) + min(second, 0)))
    return low, high


@pytest.mark.parametrize("largest", CODES)
@pytest.mark.parametrize("bound", [127, 90, 64, 40])
def test_the_bound_says_what_brute_force_says(largest: int, bound: int) -> None:
    generator = torch.Generator().manual_seed(largest + bound)
    for _ in range(5):
        weight = torch.randint(-bound - 1, bound + 1, (2, 6), generator=generator).to(torch.int8)
        low, high = worst_pairs(weight, largest)
        assert fits_int16(weight, largest) == (low >= -32768 and high <= 32767)


def test_six_and_four_bits_never_saturate() -> None:
    # Codes of b bits minus a zero point among them lie within +-(2^b - 1).
    for bits in (2, 3, 4, 5, 6):
        largest = 2**bits - 1
        extreme = torch.tensor([[largest, largest], [-largest, -largest]], dtype=torch.int8)
        assert fits_int16(extreme, 255)
    assert not fits_int16(torch.tensor([[65, 65]], dtype=torch.int8), 255)
    assert fits_int16(torch.tensor([[65, 0, 63]], dtype=torch.int8), 255)  # 255 (65 + 63) fits


@pytest.mark.parametrize("largest", CODES)
def test_a_split_adds_up_and_neither_part_saturates(largest: int) -> None:
    every = torch.arange(-128, 128).to(torch.int8).reshape(1, -1)
    low, high = split(every, largest)
    assert torch.equal(low.int() + high.int(), every.int())
    for part in (low, high):
        assert fits_int16(part, largest)


@pytest.mark.parametrize("shape", [(1, 64, 8), (2, 33, 17), (50, 96, 40), (7, 1, 3)])
def test_weights_within_the_bound_are_multiplied_exactly(shape: tuple[int, int, int]) -> None:
    rows, inner, outer = shape
    generator = torch.Generator().manual_seed(rows)
    for largest, bound in ((255, 64), (127, 127), (63, 127)):
        weight = torch.randint(0, 2, (outer, inner), generator=generator) * 2 * bound - bound
        weight = weight.to(torch.int8)
        assert fits_int16(weight, largest)
        for codes in (
            torch.full((rows, inner), largest, dtype=torch.uint8),
            torch.randint(0, largest + 1, (rows, inner), generator=generator).to(torch.uint8),
        ):
            assert torch.equal(product(codes, weight), exact(codes, weight))


@pytest.mark.parametrize("rows", [1, 5])
def test_both_parts_of_a_split_are_exact_on_the_largest_codes(rows: int) -> None:
    weight = torch.full((6, 40), 127, dtype=torch.int8)
    weight[::2] = -128
    codes = torch.full((rows, 40), 255, dtype=torch.uint8)
    low, high = split(weight, 255)
    assert torch.equal(product(codes, low) + product(codes, high), exact(codes, weight))
    # and the probe tells what the undivided product does here
    assert torch.equal(product(codes, weight), exact(codes, weight)) != saturates()


def test_a_packed_weight_follows_its_codes_and_copies_without_them() -> None:
    import copy

    weight = PackedWeight(torch.ones(4, 8, dtype=torch.int8))
    codes = torch.ones(2, 8, dtype=torch.uint8)

    def run(module: PackedWeight) -> float:
        ones, zeros = torch.ones(4), torch.zeros(4, dtype=torch.int32)
        args = (codes, 1.0, 0, module(), ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        return float(QLINEAR(*args)[0, 0])

    assert run(weight) == 8.0
    twin = copy.deepcopy(weight)
    twin.load_state_dict({"codes": torch.full((4, 8), 2, dtype=torch.int8)})
    assert (run(twin), run(weight)) == (16.0, 8.0)
