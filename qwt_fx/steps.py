"""The data-dependent steps of a quantization, in their order."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike

from torch.fx import GraphModule

from qwt_fx.batches.batch import Batches
from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.batches.value_store import ValueStore, value_store
from qwt_fx.calibrate.block_compensation import why_none_compensated
from qwt_fx.calibrate.observe_ranges import check_parameters, config_of, observe
from qwt_fx.checkpoint.calibration_identity import calibration_journal
from qwt_fx.checkpoint.journal import Journal
from qwt_fx.config.compensation_kind import CompensationSettings
from qwt_fx.config.settings import settings_of
from qwt_fx.graph.conditions import plain_conditions
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


@plain_conditions()
def calibrate(
    prepared: GraphModule,
    batches: Batches,
    *,
    seconds: Seconds | None = None,
    progress: Progress | None = None,
    checkpoint: str | PathLike[str] | Journal | None = None,
    memory_budget: str | int | ValueStore | None = None,
    ranges_found: Callable[[], None] | None = None,
    tell: Callable[[str], None] | None = None,
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
        ranges_found: called when every quantizer has its range and is switched on: in the published
            procedure before anything moves into weights, otherwise at the end.
        tell: called with one line where a compensation was asked for and no block got one, instead of
            `warnings.warn`.

    Raises `ConfigError` for a checkpoint of another configuration, model, version or data. Raises
    `DataError` for a generator, no batch, or values that are not finite, parameters included;
    the message names the parameter or the layer.
    """
    check_parameters(prepared)
    distributed = DistributedBatches.of(batches)
    then = ranges_found or (lambda: None)
    if not fake_quant_nodes(prepared):
        then()
        return prepared
    with (
        value_store(memory_budget) as store,
        calibration_journal(checkpoint, prepared, distributed) as journal,
    ):
        _calibrate(prepared, distributed, _Run(journal, store, seconds, progress, then))
    compensation = settings_of(config_of(prepared)).compensation
    why = compensation and why_none_compensated(prepared, compensation.kind)
    if why and distributed.ranks.first:
        if tell is not None:
            tell(why)
        elif not graph_info(prepared).compensations:  # fits that would not help are in the report
            warnings.warn(why, stacklevel=2)
    return prepared


@dataclass(frozen=True)
class _Run:
    """Where one calibration keeps results and activations, and whom it tells what."""

    journal: Journal
    store: ValueStore
    seconds: Seconds | None
    progress: Progress | None
    ranges_found: Callable[[], None]

    def phase(self, phase: str) -> Callable[[int, int], None] | None:
        return None if self.progress is None else partial(self.progress, phase)


def _calibrate(prepared: GraphModule, batches: DistributedBatches, run: _Run) -> None:
    settings = settings_of(config_of(prepared))
    by_output = settings.layers is not None and settings.layers.ranges == "output"
    if settings.choose_softmax and not by_output:
        ChooseSoftmaxQuantizer(batches)(prepared)
    if settings.exceptions > 0.0:
        RaiseSensitiveLayers(batches, settings.exceptions, journal=run.journal)(prepared)
    floating = _floating_twin(prepared)
    if settings.embedding_bits == 8:  # first, so that the layers are fitted on what they will read
        QuantizeEmbeddings()(prepared)
    if settings.layers is None:
        _published(prepared, batches, settings.compensation, run)
    else:
        with timed(run.seconds, "reparameterize"):
            if settings.constant_tokens:
                FixConstantTokens(batches)(prepared)
        with timed(run.seconds, "calibrate"):
            CalibrateLayers(
                floating,
                batches,
                settings.layers,
                run.phase("calibrate"),
                run.journal,
                run.store,
                settings.compensation,
                partial(timed, run.seconds, "compensate", inside="calibrate"),
                settings.choose_softmax,
            )(prepared)
        run.ranges_found()
    with timed(run.seconds, "calibrate"):
        if batches.ranks.first:  # which holds batch 0
            # What quantization does to each layer: every product runs on these twice.
            measure_layers(prepared, batches.first_samples())


def _published(
    prepared: GraphModule,
    batches: DistributedBatches,
    compensation: CompensationSettings | None,
    run: _Run,
) -> None:
    """RepQ-ViT's procedure, and QwT's behind it."""
    with timed(run.seconds, "calibrate"):
        observe(prepared, batches, run.journal)
    run.ranges_found()
    with timed(run.seconds, "reparameterize"):
        PassManager((ReparameterizeLayerNorm(), FoldChannelWise()))(prepared)
    # The reparameterized blocks without quantizers, as the published code takes them: the same
    # function as the model's own blocks up to rounding.
    floating = _floating_twin(prepared)
    with timed(run.seconds, "compensate"):
        if compensation is not None:
            InsertCompensation(
                floating,
                batches,
                **vars(compensation),
                progress=run.phase("compensate"),
                journal=run.journal,
                store=run.store,
            )(prepared)


def _floating_twin(prepared: GraphModule) -> GraphModule:
    """The prepared graph without its quantizers, sharing every tensor with it."""
    twin = GraphModule(prepared, copy.deepcopy(prepared.graph))
    set_graph_info(twin, copy.deepcopy(graph_info(prepared)))
    RemoveObservers()(twin)
    return twin
