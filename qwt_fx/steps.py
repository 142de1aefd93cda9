"""The data-dependent steps of a quantization, in their order."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.batches.value_store import ValueStore, value_store
from qwt_fx.calibrate.observe_ranges import check_parameters, config_of, observe
from qwt_fx.checkpoint.calibration_identity import calibration_journal
from qwt_fx.checkpoint.journal import Journal
from qwt_fx.config.recipes import compensation_of, recipe_for
from qwt_fx.graph.graph_info import graph_info, set_graph_info
from qwt_fx.graph.pass_base import PassManager
from qwt_fx.measure.measure import measure_layers
from qwt_fx.passes.calibrate_layers import CalibrateLayers
from qwt_fx.passes.choose_softmax_quantizer import ChooseSoftmaxQuantizer
from qwt_fx.passes.fix_constant_tokens import FixConstantTokens
from qwt_fx.passes.fold_channel_wise import FoldChannelWise
from qwt_fx.passes.insert_compensation import InsertCompensation
from qwt_fx.passes.quantize_embeddings import QuantizeEmbeddings
from qwt_fx.passes.raise_sensitive_layers import RaiseSensitiveLayers
from qwt_fx.passes.remove_observers import RemoveObservers
from qwt_fx.passes.reparameterize_layer_norm import ReparameterizeLayerNorm
from qwt_fx.quant.fake_quant import fake_quant_nodes

Seconds = dict[str, float]
Progress = Callable[[str, int, int], None]


@contextmanager
def timed(seconds: Seconds | None, phase: str, inside: str | None = None) -> Iterator[None]:
    """Clock a phase; `inside`: another one that is being clocked, and pauses."""
    begun = time.perf_counter()
    yield
    if seconds is not None:
        taken = time.perf_counter() - begun
        seconds[phase] = seconds.get(phase, 0.0) + taken
        if inside is not None:
            seconds[inside] = seconds.get(inside, 0.0) - taken


def calibrate(
    prepared: GraphModule,
    batches: Any,
    *,
    seconds: Seconds | None = None,
    progress: Progress | None = None,
    checkpoint: str | PathLike[str] | Journal | None = None,
    memory_budget: str | int | ValueStore | None = None,
) -> GraphModule:
    """Every data-dependent step, in order and in place: ranges, reparameterization, compensation.

    Args:
        prepared: what `prepare` returned.
        batches: a list (or re-iterable) of tuples of tensors, or of tensors for one-input models; or,
            where several processes calibrate one model together, each one's `DistributedBatches`.
        seconds: gets the time of each phase, in seconds, added under "calibrate",
            "reparameterize" and "compensate".
        progress: called as progress(phase, done, total).
        checkpoint: a folder that keeps what was found after every group of layers and every block. A
            run that was cut off goes on from it, called with the same graph, batches and threads,
            and gives bit-identical results; a run that ends removes it. Or a journal of the caller's.
        memory_budget: bytes ("2GB") of activations held between two steps; what finds no room goes to
            temporary files. Changes no result. Or a store of the caller's.

    Raises `ConfigError` for a checkpoint of another configuration, model, version or data. Raises
    `DataError` for a generator, no batch, or values that are not finite, parameters included;
    the message names the parameter or the layer.
    """
    check_parameters(prepared)
    share = DistributedBatches.of(batches)
    if not fake_quant_nodes(prepared):
        return prepared
    with (
        value_store(memory_budget) as store,
        calibration_journal(checkpoint, prepared, share) as journal,
    ):
        _calibrate(prepared, share, _Keeping(journal, store), seconds, progress)
    return prepared


@dataclass(frozen=True)
class _Keeping:
    """Where results and activations are kept."""

    journal: Journal
    store: ValueStore


def _calibrate(
    prepared: GraphModule,
    share: DistributedBatches,
    keeping: _Keeping,
    seconds: Seconds | None,
    progress: Progress | None,
) -> None:
    config = config_of(prepared)
    recipe = recipe_for(config)
    if config.attention == "auto" and config.bits_for("").activation is not None:
        ChooseSoftmaxQuantizer(share)(prepared)
    if config.exceptions > 0.0:
        RaiseSensitiveLayers(share, config.exceptions, journal=keeping.journal)(prepared)
    floating = _floating_twin(prepared)
    compensation = compensation_of(recipe, config.hold_out)
    if recipe.embedding_bits == 8:  # first, so that the layers are fitted on what they will read
        QuantizeEmbeddings()(prepared)
    if recipe.layers is None:
        with timed(seconds, "calibrate"):
            observe(prepared, share, keeping.journal)
        with timed(seconds, "reparameterize"):
            PassManager((ReparameterizeLayerNorm(), FoldChannelWise()))(prepared)
        # The reparameterized blocks without quantizers, as the published code takes them: the same
        # function as the model's own blocks up to rounding.
        floating = _floating_twin(prepared)
        with timed(seconds, "compensate"):
            if compensation is not None:
                InsertCompensation(
                    floating,
                    share,
                    **vars(compensation),
                    progress=_phase(progress, "compensate"),
                    **vars(keeping),
                )(prepared)
    else:
        with timed(seconds, "reparameterize"):
            if recipe.constant_tokens:
                FixConstantTokens(share)(prepared)
        with timed(seconds, "calibrate"):
            CalibrateLayers(
                floating,
                share,
                recipe.layers,
                _phase(progress, "calibrate"),
                **vars(keeping),
                compensation=compensation,
                compensating=partial(timed, seconds, "compensate", inside="calibrate"),
            )(prepared)
    with timed(seconds, "calibrate"):
        if share.ranks.first:  # which holds batch 0
            measure_layers(prepared, _first_samples(share.batches[0]))


def _first_samples(batch: Any, count: int = 32) -> Any:
    """Samples that tell what quantization does to each layer; every product runs on them twice."""
    return tree_map_only(Tensor, lambda x: x[:count] if x.dim() else x, batch)


def _phase(progress: Progress | None, phase: str) -> Callable[[int, int], None] | None:
    return None if progress is None else partial(progress, phase)


def _floating_twin(prepared: GraphModule) -> GraphModule:
    """The prepared graph without its quantizers, sharing every tensor with it."""
    twin = GraphModule(prepared, copy.deepcopy(prepared.graph))
    set_graph_info(twin, copy.deepcopy(graph_info(prepared)))
    RemoveObservers()(twin)
    return twin
