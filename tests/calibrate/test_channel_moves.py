"""What is moved out of a value is found without an edit, and the edit leaves the function as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.fx import GraphModule
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.calibrate.channel_moves import apply_move, find_move
from qwt_fx.calibrate.layer_range import RangeSearch
from qwt_fx.calibrate.paired_walk import PairedWalk
from qwt_fx.config.config import QuantConfig
from qwt_fx.config.layer_settings import LayerSettings
from qwt_fx.graph.pass_base import clean_up
from qwt_fx.passes import InsertObservers
from qwt_fx.quant.fake_quant import Mode, fake_quant_of, set_mode
from qwt_fx.quant.layer_groups import LayerGroup, find_groups

BATCHES = [tokens(8, 6, seed=s) for s in range(4)]
INTO = {"fc1": "the norm", "out": "the values", "fc2": "a product of the input"}


def _at(layer: str) -> tuple[GraphModule, PairedWalk, LayerGroup, RangeSearch]:
    """A tower's walk where the first layer of a name is next; nothing is quantized before it."""
    model = randomize(Tower(1)).double()
    with torch.no_grad():  # a hidden channel far larger than the others: worth a product
        model.blocks[0].fc1.weight[0] *= 100.0
    batches = [b.double() for b in BATCHES]
    reference = qwt_fx.capture(model, (batches[0],))
    gm = copy.deepcopy(reference)
    InsertObservers(QuantConfig(4, 4))(gm)
    set_mode(gm, Mode.OFF)
    groups = find_groups(gm)
    group = next(
        g for g in groups if layer in [str(n.meta["layer"]).split(".")[-1] for n in g.layers]
    )
    walk = PairedWalk(gm, reference, DistributedBatches.of(batches), groups, LayerSettings())
    walk.advance(group)
    assert group.quantizer is not None
    return gm, walk, group, RangeSearch(walk, group, fake_quant_of(gm, group.quantizer))


@pytest.mark.parametrize("layer", INTO)
@torch.no_grad()
def test_finding_edits_nothing_and_applying_keeps_the_function(layer: str) -> None:
    gm, walk, group, search = _at(layer)
    x = BATCHES[0].double()
    nodes, wanted = [str(n) for n in gm.graph.nodes], gm(x)
    values = [v.clone() for v in walk.values(group.source)]
    move = find_move(search)
    assert move is not None and move.site.into == INTO[layer]
    assert [str(n) for n in gm.graph.nodes] == nodes
    assert all(map(torch.equal, walk.values(group.source), values))

    twin = walk.twin(group.source)
    apply_move(walk, group, move)
    clean_up(gm)
    torch.testing.assert_close(gm(x), wanted, rtol=1e-10, atol=1e-10)
    assert walk.twin(group.source) is twin  # also where a product is read from now on
    scale, shift = move.rescale.scale, move.rescale.shift
    for now, before in zip(walk.values(group.source), values, strict=True):
        torch.testing.assert_close(now, before / scale - shift, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_value_that_something_else_reads_stays_as_it_is() -> None:
    _, _, group, search = _at("fc1")
    search.group = LayerGroup(group.quantizer, group.layers, shared=True)
    assert find_move(search) is None
