"""Uniform or log-sqrt2 codes for each softmax output, whichever the values suffer less from (W10)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx.errors import PreconditionError
from qwt_fx.fake_quant import FakeQuant
from qwt_fx.graph import MATMULS, SHAPE_ONLY, is_call
from qwt_fx.norms import fake_quant_of, is_fake_quant
from qwt_fx.pass_base import Change, Pass, Skip
from qwt_fx.qparams import AFFINE, LOG_SQRT2
from qwt_fx.runner import Env, check_batches, run_all


@dataclass(frozen=True)
class ChooseSoftmaxQuantizer(Pass):
    """Make a log-sqrt2 quantizer uniform where that disturbs softmax(QK^T) V less.

    RepQ-ViT takes log-sqrt2 codes everywhere (section 3.3). They spend their levels on small
    probabilities: worth it at 4 bits, a loss at 8, where uniform codes are fine already. The error of
    the product with the values is measured on the first batch, for each softmax on its own.

    batches: calibration batches, a list of tuples of tensors (or of tensors). Must follow
    `InsertLogSqrt2Softmax` and stand before calibration; raises `PreconditionError` after it.
    """

    batches: Any

    must_follow: ClassVar[tuple[str, ...]] = ("InsertLogSqrt2Softmax",)
    preserves_fp: ClassVar[bool] = True

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        """See the class."""
        first = check_batches(self.batches)[0]
        products = dict(_products(gm))
        found: list[Change] = []

        def visit(node: Node, env: Env) -> None:
            if node in products:
                module, probabilities, values = products[node]
                found.append(_choose(module, env[probabilities], env[values]))

        run_all(gm, first, visit)
        yield from found


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


def _choose(module: FakeQuant, probabilities: Tensor, values: Tensor) -> Change:
    """Give the quantizer the scheme with the lesser error; it stays uncalibrated."""
    errors = {}
    for scheme in (LOG_SQRT2, AFFINE):
        trial = FakeQuant(replace(module.spec, scheme=scheme), module.name)
        trial.observe(probabilities)
        disturbed = trial.fake_quantize(probabilities) - probabilities
        errors[scheme] = float(torch.matmul(disturbed, values).square().sum(dtype=torch.float64))
    best = min(errors, key=lambda scheme: errors[scheme])
    module.spec = replace(module.spec, scheme=best)
    what = f"{best}: squared error log-sqrt2 {errors[LOG_SQRT2]:.4g}, uniform {errors[AFFINE]:.4g}"
    return Change(module.name, what)
