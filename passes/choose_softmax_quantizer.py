"""Uniform or log-sqrt2 codes for each softmax output, whichever the values suffer less from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.batches.batch import Batches
from qwt_fx.batches.distributed_batches import DistributedBatches
from qwt_fx.batches.precision import wide
from qwt_fx.errors import PreconditionError
from qwt_fx.graph.aten import MATMULS, SHAPE_ONLY
from qwt_fx.graph.nodes import is_call
from qwt_fx.graph.pass_base import Change, Pass, Skip
from qwt_fx.graph.runner import Env, run_all
from qwt_fx.numerics.qparams import AFFINE, LOG_SQRT2
from qwt_fx.quant.fake_quant import FakeQuant, fake_quant_of, is_fake_quant


@dataclass(frozen=True)
class ChooseSoftmaxQuantizer(Pass):
    """Make a log-sqrt2 quantizer uniform where that disturbs softmax(QK^T) V less.

    RepQ-ViT takes log-sqrt2 codes everywhere (section 3.3). They spend their levels on small
    probabilities: worth it at 4 bits, a loss at 8, where uniform codes are fine already. The error of
    the product with the values is measured on the first batch, for each softmax on its own.

    batches: calibration batches, a list of tuples of tensors (or of tensors). Must follow
    `InsertLogSqrt2Softmax` and stand before calibration; raises `PreconditionError` after it.
    """

    batches: Batches

    must_follow: ClassVar[tuple[str, ...]] = ("InsertLogSqrt2Softmax",)

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        """See the class."""
        batches = DistributedBatches.of(self.batches)
        products = dict(_products(gm))

        def errors() -> list[tuple[float, float]]:
            measured: list[tuple[float, float]] = []

            def visit(node: Node, env: Env) -> None:
                if node in products:
                    module, probabilities, values = products[node]
                    measured.append(_errors(module, env[probabilities], env[values]))

            run_all(gm, batches.batches[0], visit)
            return measured

        measured = batches.ranks.from_first(errors)
        for (module, _, _), (log_sqrt2, uniform) in zip(products.values(), measured, strict=True):
            yield _choose(module, log_sqrt2, uniform)


def _products(gm: GraphModule) -> Iterator[tuple[Node, tuple[FakeQuant, Node, Node]]]:
    """Each product of quantized probabilities with values: its quantizer and both factors."""
    for node in gm.graph.nodes:
        if not is_call(node, MATMULS) or not isinstance(node.args[0], Node):
            continue
        source = node.args[0]
        while is_call(source, SHAPE_ONLY):
            assert isinstance(source.args[0], Node)  # a shape-only op reads a node
            source = source.args[0]
        if not is_fake_quant(gm, source):
            continue
        module = fake_quant_of(gm, source)
        if module.spec.scheme != LOG_SQRT2:
            continue
        if module.calibrated:
            raise PreconditionError(f"{module.name} is calibrated: choose its codes before that")
        assert isinstance(node.args[1], Node)  # a product of two activations
        yield node, (module, node.args[0], node.args[1])


def _errors(module: FakeQuant, probabilities: Tensor, values: Tensor) -> tuple[float, float]:
    """Squared error of the product with log-sqrt2 and with uniform codes."""
    errors = []
    for scheme in (LOG_SQRT2, AFFINE):
        trial = FakeQuant(replace(module.spec, scheme=scheme), module.name)
        trial.observe(probabilities)
        disturbed = wide(trial.fake_quantize(probabilities)) - wide(probabilities)
        product = torch.matmul(disturbed, wide(values))
        errors.append(float(product.square().sum(dtype=torch.float64)))
    return errors[0], errors[1]


def _choose(module: FakeQuant, log_sqrt2: float, uniform: float) -> Change:
    """Give the quantizer the scheme with the lesser error; it stays uncalibrated."""
    best = LOG_SQRT2 if log_sqrt2 <= uniform else AFFINE
    module.spec = replace(module.spec, scheme=best)
    what = f"{best}: squared error log-sqrt2 {log_sqrt2:.4g}, uniform {uniform:.4g}"
    return Change(module.name, what)
