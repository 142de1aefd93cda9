"""What calibration found, on the disk: nothing is lost, nothing damaged is believed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwt_fx.checkpoint.journal import NO_JOURNAL, StoredJournal
from qwt_fx.checkpoint.journal_codec import decode, encode, settled
from qwt_fx.errors import ArtifactError, ConfigError
from qwt_fx.numerics.layer_fit import FittedLayer
from qwt_fx.numerics.rescale_search import Rescale

IDENTITY = {"version": "1", "setting w_bits": 4}


def forbidden() -> None:
    raise AssertionError("a result that is known was looked for")


def filled(folder: Path, steps: int = 3) -> list[Tensor]:
    """A journal of some committed steps; what they found."""
    journal = StoredJournal.open(folder, IDENTITY)
    found = []
    for i in range(steps):
        found.append(journal.once(f"step {i}", lambda i=i: torch.full((3,), float(i))))
        journal.commit()
    return found


def test_a_record_gives_every_bit_and_stride_back() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(4, 6, generator=generator)
    values = (
        plain,
        plain.T,  # another order of dimensions
        plain.double().permute(1, 0)[None],
        torch.tensor(0.1),
        torch.tensor([True, False]),
        plain.to(torch.bfloat16),
        torch.empty(0, 3),
        torch.tensor([float("nan"), -0.0, float("inf")]),
    )
    fitted = FittedLayer(plain, None, (plain[0], plain[1]), None, float("inf"), 0.1 + 0.2)
    steps = [("tensors", values), ("fit", fitted), ("nothing", (None, True, 3, "text", ()))]
    steps = [(name, settled(value)) for name, value in steps]
    again = decode(encode(steps))
    assert [name for name, _ in again] == ["tensors", "fit", "nothing"]
    for before, after in zip(values, again[0][1], strict=True):
        assert (after.dtype, after.shape, after.stride()) == (
            before.dtype,
            before.shape,
            before.stride(),
        )
        assert after.contiguous().reshape(-1).view(torch.uint8).tolist() == (
            before.contiguous().reshape(-1).view(torch.uint8).tolist()
        )
    fit = again[1][1]
    assert (fit.bias, fit.ridge, fit.before, fit.after) == (None, None, float("inf"), 0.1 + 0.2)
    assert torch.equal(fit.weight, plain)
    assert again[2][1] == (None, True, 3, "text", ())


def test_a_result_is_the_same_with_and_without_a_disk() -> None:
    gaps = torch.arange(12.0).reshape(3, 4)[:, ::2]  # not dense: cannot be kept as it lies
    with_disk, without = settled(gaps), NO_JOURNAL.once("x", lambda: gaps)
    assert with_disk.stride() == without.stride() == (2, 1)
    assert torch.equal(without, gaps)


def test_nothing_but_results_is_written() -> None:
    with pytest.raises(TypeError, match="cannot hold a set"):
        encode([("x", {1})])
    with pytest.raises(ArtifactError, match="not a record"):
        decode(b"\x80\x04garbage" * 10)
    record = encode([("x", Rescale(torch.ones(1), torch.ones(1), 0.5, 0.1, ()))])
    with pytest.raises(ArtifactError, match="not a record"):
        decode(record.replace(b"Rescale", b"Unknown"))


def test_known_results_are_taken_and_new_ones_found(tmp_path: Path) -> None:
    found = filled(tmp_path / "j")
    journal = StoredJournal.open(tmp_path / "j", IDENTITY)
    assert journal.commits == 3
    for i, value in enumerate(found):
        assert torch.equal(journal.once(f"step {i}", forbidden), value)
        journal.commit()
    assert journal.once("step 3", lambda: 7) == 7
    journal.commit()
    again = StoredJournal.open(tmp_path / "j", IDENTITY)
    assert [again.once(f"step {i}", forbidden) for i in range(4)][3] == 7


def test_what_was_not_committed_is_found_again(tmp_path: Path) -> None:
    journal = StoredJournal.open(tmp_path / "j", IDENTITY)
    journal.once("a", lambda: 1)
    journal.commit()
    journal.once("b", lambda: 2)
    again = StoredJournal.open(tmp_path / "j", IDENTITY)
    assert again.once("a", forbidden) == 1
    assert again.once("b", lambda: 3) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_file_ends_what_is_known(tmp_path: Path, damage: str) -> None:
    filled(tmp_path / "j")
    second = sorted((tmp_path / "j").glob("000001-*"))[0]
    data = bytearray(second.read_bytes())
    if damage == "cut":
        second.write_bytes(data[:-3])
    elif damage == "flipped":
        data[-1] ^= 1
        second.write_bytes(data)
    else:
        second.unlink()
    journal = StoredJournal.open(tmp_path / "j", IDENTITY)
    assert journal.commits == 1
    assert len(journal.notes) == 1
    assert ("damaged" if damage != "missing" else "not number 1") in journal.notes[0]
    assert float(journal.once("step 0", forbidden)[0]) == 0.0
    assert journal.once("step 1", lambda: 8) == 8
    journal.commit()
    assert StoredJournal.open(tmp_path / "j", IDENTITY).notes == ()


def test_a_lost_beginning_begins_anew(tmp_path: Path) -> None:
    filled(tmp_path / "j")
    (tmp_path / "j" / "run.json").write_text("{")
    assert StoredJournal.open(tmp_path / "j", IDENTITY).commits == 0


def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    filled(tmp_path / "j")
    left = tmp_path / "j" / f".000003-{'0' * 64}.safetensors.a1b2"
    left.write_bytes(b"half")
    assert StoredJournal.open(tmp_path / "j", IDENTITY).commits == 3
    assert not left.exists()


@pytest.mark.parametrize("identity", [IDENTITY | {"setting w_bits": 8}, {"version": "1"}])
def test_another_calibration_is_refused_by_what_differs(tmp_path: Path, identity: dict) -> None:
    filled(tmp_path / "j")
    with pytest.raises(ConfigError, match=r"setting w_bits is (8|None), there it was 4"):
        StoredJournal.open(tmp_path / "j", identity)


def test_another_walk_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "j")
    with pytest.raises(ConfigError, match="goes on with 'step 0', this calibration with 'other'"):
        StoredJournal.open(tmp_path / "j", IDENTITY).once("other", forbidden)
