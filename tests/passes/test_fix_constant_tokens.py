from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_clip import small_model
from torch import Tensor
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx import api
from qwt_fx.clip.clip import TextTower
from qwt_fx.config.config import QuantConfig
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import find_node
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.passes import FixConstantTokens
from qwt_fx.text.token_map import token_mask

START, END = 49406, 49407


def _texts(batch: int = 6, seed: int = 0, start: int = START) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(batch, 12, dtype=torch.int64)
    ids[:, 0] = start
    for i in range(batch):
        words = int(torch.randint(2, 9, (1,), generator=generator))
        ids[i, 1 : words + 1] = torch.randint(1, 49000, (words,), generator=generator)
        ids[i, words + 1] = END
    return ids


@pytest.fixture(scope="module")
def tower() -> TextTower:
    return TextTower(small_model())


def test_function_is_unchanged_for_every_start_token(tower: TextTower) -> None:
    gm = qwt_fx.capture(tower, (_texts(),))
    result = FixConstantTokens([_texts(), _texts(seed=1)])(gm)
    assert len(result.changes) == 2
    assert not result.skips
    assert graph_info(gm).constant_token == START
    for x in (_texts(3, seed=2), _texts(3, start=7)):
        torch.testing.assert_close(gm(x), tower(x), rtol=1e-5, atol=1e-6)


def test_other_samples_of_the_batch_may_begin_differently(tower: TextTower) -> None:
    gm = qwt_fx.capture(tower, (_texts(),))
    FixConstantTokens([_texts()])(gm)
    mixed = torch.cat([_texts(2, seed=3), _texts(2, seed=4, start=7)])
    torch.testing.assert_close(gm(mixed), tower(mixed), rtol=1e-5, atol=1e-6)


def test_second_run_is_unmodified(tower: TextTower) -> None:
    gm = qwt_fx.capture(tower, (_texts(),))
    FixConstantTokens([_texts()])(gm)
    again = FixConstantTokens([_texts()])(gm)
    assert not again.modified
    assert again.skips[0].reason == "its start token is fixed already"


def test_near_misses_are_skipped_with_their_reason(tower: TextTower) -> None:
    gm = qwt_fx.capture(tower, (_texts(),))
    code = gm.code
    (skip,) = FixConstantTokens([_texts(), _texts(start=7)])(gm).skips
    assert skip.reason == "its texts begin with different tokens"
    assert gm.code == code
    image = qwt_fx.capture(randomize(Tower(1)), (tokens(),))
    (skip,) = FixConstantTokens([tokens()])(image).skips
    assert skip.reason == "the input is not one tensor of token ids"


def test_an_extreme_start_token_no_longer_hurts(tower: TextTower) -> None:
    model = small_model()
    with torch.no_grad():
        model.positional_embedding[0, :3] += 30.0
    extreme = TextTower(model)
    batches, x = [_texts(32, seed=s) for s in range(4)], _texts(64, seed=9)
    found = {}
    for fixed in (True, False):
        config = QuantConfig(4, 4, constant_tokens=fixed, token_scales=False, embedding_bits=32)
        q = api.quantize(extreme, (x,), batches, config)
        with torch.no_grad():
            found[fixed] = sqnr_db(extreme(x), q(x))
    assert found[True] > found[False]


def test_fixed_start_survives_saving_and_loading(tower: TextTower, tmp_path: Path) -> None:
    x = _texts()
    q = api.quantize(tower, (x,), [x, _texts(seed=1)], QuantConfig(6, 6))
    api.save(q, tmp_path / "a")
    loaded = api.load(tmp_path / "a")
    assert torch.equal(loaded(x), q(x))
    assert graph_info(loaded).constant_token == START


def test_positions_behind_the_end_are_still_proved_not_to_matter(tower: TextTower) -> None:
    gm = qwt_fx.capture(tower, (_texts(),))
    block = find_node(gm, graph_info(gm).blocks[1].input)
    before = token_mask(gm, (_texts(),), [block])
    FixConstantTokens([_texts()])(gm)
    after = token_mask(gm, (_texts(),), [block])
    assert after.reason is None
    assert torch.equal(after.rows[block.name], before.rows[block.name])
    assert not bool(after.rows[block.name].all())
    assert after.positions[block.name].max() == 11


def test_an_override_by_later_ids_ends_the_proof(tower: TextTower) -> None:
    gm = qwt_fx.capture(tower, (_texts(),))
    FixConstantTokens([_texts()])(gm)
    (chosen,) = [
        n for n in gm.graph.nodes if n.target is torch.ops.aten.select.int and n.args[1:] == (1, 0)
    ]
    chosen.args = (chosen.args[0], 1, 3)
    gm.recompile()
    assert "the ids' values act on activations" in str(token_mask(gm, (_texts(),), []).reason)
