"""Runs `compat="original"` on a golden file and gives every figure under the file's own key.

Rounding. Where x / scale lies next to .5, the last bit of a matrix product decides which way a value
rounds, and that bit depends on the CPU (how many numbers its vectors add at once). One flip moves the
ranges behind it, those move others, and so on: after two blocks the outputs of the same code on two
CPUs differ by tens of percents of the quantization error. So no fixed tolerance is right on every
CPU. The tests therefore measure how far the procedure moves when every weight is changed by one unit
in its last place, and where the strict tolerance fails, the original must lie no further away than
that. Before the first flip nothing moves, and the strict tolerance is what counts.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from golden_files import (
    ATTENTION_FILE,
    CLIP_FILE,
    golden_batches,
    golden_inputs,
    golden_towers,
    is_full,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.fx import GraphModule, Node

from qwt_fx import api
from qwt_fx.calibrate.observe_ranges import observe
from qwt_fx.config.config import QuantConfig
from qwt_fx.evaluate.classifier import ClassifierQuantizer, class_weights
from qwt_fx.graph.aten import LAYER_NORM
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import find_node, tensor_of
from qwt_fx.graph.runner import run_all
from qwt_fx.quant.fake_quant import fake_quant_nodes, fake_quant_of

NUDGES = 4  # nudged runs
TEMPLATES = 4
_ATTENTION = {
    "matmul1.operand 0": "matmul1.quantizer_A",
    "matmul1.operand 1": "matmul1.quantizer_B",
    "matmul2.probabilities": "matmul2.quantizer_A",
    "matmul2.operand 1": "matmul2.quantizer_B",
}

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What a golden file's name says."""

    choice: str  # "image_only", "all_quant" or "attention"
    config: QuantConfig

    @property
    def towers(self) -> tuple[str, ...]:
        return ("visual", "text") if self.choice == "all_quant" else ("visual",)

    @property
    def batches(self) -> int:
        """The original reads one batch more when both towers are quantized."""
        return 5 if self.choice == "all_quant" else 4


def setting_of(path: Path) -> Setting:
    """The setting of a golden file."""
    match, attention = CLIP_FILE.fullmatch(path.name), ATTENTION_FILE.fullmatch(path.name)
    found = match or attention
    assert found is not None
    bits = [int(b) for b in re.findall(r"[wa](\d)", path.stem.removeprefix("attention_image_"))]
    config = QuantConfig(
        *bits,
        recipe="repq-vit",
        compat="original",
        compensation="qwt" if path.stem.endswith("_qwt") else "none",
        attention="log2" if attention else "none",
    )
    return Setting(match[1] if match else "attention", config)


def _nudged(gm: GraphModule, seed: int) -> GraphModule:
    """A copy with every parameter changed by -1, 0 or 1 unit in the last place, at random."""
    nudged = copy.deepcopy(gm)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in nudged.parameters():
            steps = torch.randint(-1, 2, parameter.shape, generator=generator)
            parameter.mul_(1.0 + steps * torch.finfo(torch.float32).eps)
    return nudged


@cache
def golden(path: Path) -> Values:
    """The tensors of a golden file."""
    return load_file(path)


@cache
def values(path: Path, strict: bool = False, nudge: int = 0) -> Values:
    """Every figure of our run, under the golden file's keys; `nudge` > 0 nudges the weights."""
    setting, inputs = setting_of(path), golden_inputs(path.parent)
    found: Values = {}
    calibrated: dict[str, GraphModule] = {}
    classifier: ClassifierQuantizer | None = None
    for tower in setting.towers:
        batches = golden_batches(path.parent, tower, setting.batches)
        gm = golden_towers(path.parent, strict)[tower]
        prepared = api.prepare(gm if nudge == 0 else _nudged(gm, nudge), setting.config)
        observe(prepared, batches)
        if setting.choice == "image_only":
            with torch.no_grad():
                classifier = ClassifierQuantizer.observe(prepared(batches[0]), setting.config)
        found |= _quantizers(prepared, "init")
        calibrated[tower] = gm = api.calibrate(prepared, batches)
        found |= _quantizers(gm, "final") | _reparameterized(gm) | _compensations(gm, tower)
        evaluation = inputs["eval.images" if tower == "visual" else "eval.texts"]
        found |= _outputs(gm, tower, evaluation, setting.choice)
    if setting.choice != "attention" and is_full(path):
        found |= _classified(path, calibrated, classifier)
    return found


def _original_name(layer: str) -> str:
    return layer.replace("attn.in_proj", "attn.qkv").replace("attn.out_proj", "attn.proj")


def _quantizers(gm: GraphModule, stage: str) -> Values:
    found: Values = {}
    for node in fake_quant_nodes(gm):
        module = fake_quant_of(gm, node)
        layer, kind = module.name.rsplit(".", 1)
        name = f"{_original_name(layer)}.{kind}_quantizer"
        for ours, theirs in _ATTENTION.items():
            if module.name.endswith(ours):
                name = module.name.removesuffix(ours) + theirs
        assert module.scale is not None
        found[f"{stage}.{name}.delta"] = module.scale.reshape(-1).clone()
        if module.zero_point is not None:
            found[f"{stage}.{name}.zero_point"] = module.zero_point.reshape(-1).clone()
    return found


def _reparameterized(gm: GraphModule) -> Values:
    """Weights and biases of norms and of the layers that are quantized."""
    found: Values = {}
    for node in gm.graph.nodes:
        name = _original_name(str(node.meta.get("layer", "")))
        if node.target is LAYER_NORM:
            weight, bias = node.args[2], node.args[3]
        elif node.op == "call_function" and len(node.args) > 2:
            weight, bias = getattr(node.args[1], "args", (None,))[0], node.args[2]
        else:
            continue
        for kind, argument in (("weight", weight), ("bias", bias)):
            value = tensor_of(gm, argument)
            if value is not None:
                found[f"reparam.{name}.{kind}"] = value.detach()
    return found


def _compensations(gm: GraphModule, tower: str) -> Values:
    found: Values = {}
    tensors = api.compensations(gm)
    for index, (block, record) in enumerate(graph_info(gm).compensations.items()):
        found[f"qwt.{tower}.{index}.r2"] = torch.tensor(record["r2"])
        if record["applied"]:
            found[f"qwt.{tower}.{index}.W"] = tensors[block]["W"]
            found[f"qwt.{tower}.{index}.b"] = tensors[block]["b"]
    return found


def _outputs(gm: GraphModule, tower: str, batch: Tensor, choice: str) -> Values:
    """The tower's features and its blocks' outputs."""
    ends = [find_node(gm, block.output) for block in graph_info(gm).blocks]
    held: dict[Node, Tensor] = {}

    def visit(node: Node, env: dict[Node, Tensor]) -> None:
        held.update({end: env[end] for end in ends if end in env})

    (features,) = run_all(gm, batch, visit)
    if choice == "attention":
        blocks = {f"quant.block{i}.out": held[end] for i, end in enumerate(ends)}
        return {"quant.features": features} | blocks
    blocks = {f"quant.{tower}.block{i}.out": held[end] for i, end in enumerate(ends)}
    return {f"quant.{'image' if tower == 'visual' else 'text'}_features": features} | blocks


def _classified(
    path: Path, calibrated: dict[str, GraphModule], classifier: ClassifierQuantizer | None
) -> Values:
    """Class weights, and logits up to the logit scale, of the zero-shot classifier."""
    inputs, towers = golden_inputs(path.parent), golden_towers(path.parent) | calibrated
    with torch.no_grad():
        weights = class_weights(towers["text"](inputs["class.texts"]), TEMPLATES)
        images = calibrated["visual"](inputs["eval.images"])
    found = {"classifier.weight": weights}
    if classifier is None:
        logits = torch.nn.functional.normalize(images, dim=-1) @ weights.T
    else:
        module = classifier.input
        assert module is not None
        assert module.scale is not None
        found["init.classifier.input_quantizer.delta"] = module.scale.reshape(-1)
        logits = classifier.logits(images, weights)
    scale = golden(path)["quant.class_logits"].norm() / logits.norm()
    return found | {"quant.class_logits": logits * scale}
