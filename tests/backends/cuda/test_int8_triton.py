"""The Triton kernel itself, without a GPU: interpreted against exact integers, and compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent
# Half of the last bit, and what float32 arithmetic adds; the interpreter truncates to bf16.
TOLERANCE = {"fp32": 1e-6, "fp16": 2.0**-11 + 1e-6, "bf16": 2.0**-7 + 1e-6}


def _program(name: str, *, interpret: bool) -> Any:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    done = subprocess.run(
        [sys.executable, str(FOLDER / name)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return _program("triton_interpreted.py", interpret=True)  # type: ignore[no-any-return]


def _named(interpreted: dict[str, Any], kind: str) -> dict[str, Any]:
    found = {name: value for name, value in interpreted.items() if name.startswith(kind)}
    assert found
    return found


def test_odd_shapes_in_every_output_dtype(interpreted: dict[str, Any]) -> None:
    found = _named(interpreted, "shape")
    assert len(found) == 12
    for name, (error, _) in found.items():
        assert error <= TOLERANCE[name.split()[-1]], name


def test_every_activation_with_and_without_bias_and_token_scales(
    interpreted: dict[str, Any],
) -> None:
    found = _named(interpreted, "epilogue")
    assert len(found) == 16
    assert {name: error for name, (error, _) in found.items() if error > 2e-6} == {}


def test_zero_points_of_rows(interpreted: dict[str, Any]) -> None:
    found = _named(interpreted, "rows' zero points")
    assert len(found) == 8
    assert {name: error for name, (error, _) in found.items() if error > 2e-6} == {}


def test_sums_of_extremes_are_exact(interpreted: dict[str, Any]) -> None:
    found = _named(interpreted, "extreme")
    assert len(found) == 24
    assert [name for name, (_, unequal) in found.items() if unequal] == []


def test_quantized_results_saturate_and_round_halves_to_even(interpreted: dict[str, Any]) -> None:
    found = _named(interpreted, "quantize")
    assert [name for name in found if name.endswith("False")] == []
    assert found["quantize ties True"][1] == 0.0
    # A value within float32's error of a rounding boundary may take the code beside.
    assert all(unequal <= 0.005 for _, unequal in found.values())


@pytest.mark.slow
def test_every_configuration_compiles_to_int8_tensor_core_instructions() -> None:
    found = _program("triton_compiled.py", interpret=False)
    assert set(found) == {"80", "90"}
    for count, with_instruction, fitting in found.values():
        assert count == with_instruction == fitting
