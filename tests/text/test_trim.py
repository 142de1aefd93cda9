"""Texts cut to the longest caption of a batch give the features of whole contexts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_clip import small_config, small_model
from torch import Tensor, nn
from torch.export import Dim, export
from torch.fx import GraphModule

import qwt_fx
from qwt_fx import api
from qwt_fx.artifact.graph_json import graph_from_json, graph_to_json
from qwt_fx.clip.clip import TextTower
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import ArtifactError, DataError
from qwt_fx.evaluate.evaluate import text_features
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.sample_ids import batch_axis
from qwt_fx.passes import DecomposeAttention
from qwt_fx.quant.fake_quant import fake_quant_nodes
from qwt_fx.quant.integer_layers import IntegerLayer, layers_to_lower
from qwt_fx.text.text_length import trim

START, END, CONTEXT = 49406, 49407, 12


def _texts(batch: int, longest: int, seed: int = 0) -> Tensor:
    """Captions with start and end, the first one of `longest` ids, the others at most."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(batch, CONTEXT, dtype=torch.int64)
    for i, row in enumerate(ids):
        length = (
            longest if i == 0 else int(torch.randint(3, longest + 1, (1,), generator=generator))
        )
        row[:length] = torch.randint(1, 49000, (length,), generator=generator)
        row[0], row[length - 1] = START, END
    return ids


@pytest.fixture(scope="module")
def tower() -> TextTower:
    return TextTower(small_model())


@pytest.fixture(scope="module")
def graph(tower: TextTower) -> GraphModule:
    return qwt_fx.capture(tower, (_texts(2, CONTEXT),))


CONFIGS = {
    "repq-vit 8/8": {"w_bits": 8, "a_bits": 8, "recipe": "repq-vit", "compensation": "qwt"},
    "repq-vit 4/4 log2": {"w_bits": 4, "a_bits": 4, "recipe": "repq-vit", "attention": "log2"},
    "best 8/8": {"w_bits": 8, "a_bits": 8},
    "best 4/4": {"w_bits": 4, "a_bits": 4, "compensation": "qwt"},
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def prepared(request: pytest.FixtureRequest, graph: GraphModule) -> GraphModule:
    batches = [_texts(16, CONTEXT, seed) for seed in range(3)]
    found = api.prepare(graph, QuantConfig.from_dict(CONFIGS[request.param]))
    api.calibrate(found, batches)
    if request.param == "best 4/4":
        assert graph_info(found).constant_token == START
        assert _scale_positions(found) == {0, 1}
    return found


def _scale_positions(prepared: GraphModule) -> set[int]:
    """Give some positions scales of their own in either layout; the batch axes met."""
    factor = torch.ones(CONTEXT, 1)
    factor[1], factor[6] = 4.0, 2.0
    met = set()
    for node in fake_quant_nodes(prepared):
        source = node.args[0]
        batch = batch_axis(source)
        if batch is not None and source.meta["val"].dim() == 3:
            module = prepared.get_submodule(str(node.target))
            module.token_scale = factor if batch == 0 else factor[..., None]
            met.add(batch)
    return met


def _close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("custom", [False, True])
def test_floating_point_is_the_same_at_every_length(custom: bool) -> None:
    tower = TextTower(small_model(small_config(custom_text=True) if custom else None))
    gm = qwt_fx.capture(tower, (_texts(1, CONTEXT),))
    assert graph_info(gm).context_length == CONTEXT
    for batch in (1, 7):
        for longest in range(3, CONTEXT + 1):
            ids = _texts(batch, longest, seed=longest)
            cut = trim(gm, ids, multiple=1)
            assert cut.shape == (batch, longest)
            assert torch.equal(gm(ids), tower(ids))
            _close(gm(cut), tower(ids))


def test_quantized_is_the_same_at_every_length(prepared: GraphModule) -> None:
    converted = api.lower(api.convert(prepared), "eager")
    for batch, lengths in ((1, (3, 8, CONTEXT)), (7, range(3, CONTEXT + 1))):
        for longest in lengths:
            ids = _texts(batch, longest, seed=longest)
            cut = trim(converted, ids, multiple=1)
            assert cut.shape[1] == longest
            whole = converted(ids)
            _close(converted(cut), whole)
            _close(prepared(cut), whole)


def test_saved_graphs_of_any_length_stay_so(prepared: GraphModule, tmp_path: Path) -> None:
    converted, ids = api.convert(prepared), _texts(3, 5)
    api.save(converted, tmp_path / "a")
    loaded = api.load(tmp_path / "a")
    cut = trim(loaded, ids)
    assert cut.shape == (3, 8)
    assert torch.equal(loaded(cut), converted(cut))
    assert torch.equal(loaded(ids), converted(ids))


def test_quantized_graphs_export_with_a_dynamic_length(prepared: GraphModule) -> None:
    converted = api.convert(prepared)
    sizes = {0: Dim("batch", max=64), 1: Dim("length", min=3, max=CONTEXT - 1)}
    with torch.no_grad():
        program = export(converted, (_texts(2, 7)[:, :7].contiguous(),), dynamic_shapes=(sizes,))
    for length in (3, 9):
        ids = _texts(3, length)[:, :length].contiguous()
        _close(program.module()(ids), converted(ids))


def test_integer_layers_are_found_under_cut_token_scales(prepared: GraphModule) -> None:
    converted = api.convert(prepared)
    linears = [
        layer for layer in layers_to_lower(converted) if layer.name.endswith(("c_fc", "c_proj"))
    ]
    assert len(linears) == 4
    assert all(isinstance(layer, IntegerLayer) for layer in linears)


def test_huggingface_clip_takes_any_length() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=CONTEXT, eos_token_id=99, bos_token_id=98,
        projection_dim=8,
    )  # fmt: skip

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.CLIPTextModelWithProjection(config)

        def forward(self, input_ids: Tensor) -> Tensor:
            embedding: Tensor = self.model(input_ids=input_ids).text_embeds
            return embedding

    torch.manual_seed(0)
    model = Pooled().eval()

    def texts(batch: int, longest: int) -> Tensor:
        ids = _texts(batch, longest)
        return torch.where(ids < START, ids % 98, ids - START + 98)

    ids = texts(7, 6)
    gm = qwt_fx.capture(model, (ids,))
    assert trim(gm, ids).shape == (7, 8)
    _close(gm(trim(gm, ids)), model(ids))
    q = api.quantize(gm, (ids,), [texts(8, CONTEXT)], QuantConfig(4, 4))
    _close(q(trim(q, ids)), q(ids))


class _Text(nn.Module):
    """A one-layer text tower; `pool`, `causal` and `flip` say in which way it is unlike CLIP's."""

    def __init__(self, pool: str = "end", causal: bool = True, flip: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 8)
        self.places = nn.Parameter(torch.randn(CONTEXT, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        mask = torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1)
        self.register_buffer("mask", mask if causal else torch.zeros_like(mask))
        self.pool, self.flip = pool, flip

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        places = self.places[CONTEXT - length :] if self.flip else self.places[:length]
        x = self.table(ids) + places
        mask = self.mask[:length, :length]
        x = x + self.attention(x, x, x, need_weights=False, attn_mask=mask)[0]
        if self.pool in ("first", "last"):
            return x[:, 0 if self.pool == "first" else -1]
        if self.pool == "mean":
            return x.mean(1)
        if self.pool == "eos":
            return x[torch.arange(ids.shape[0]), (ids == 7).int().argmax(-1)]
        if self.pool == "same as last":
            return x[torch.arange(ids.shape[0]), (ids == ids[:, -1:]).int().argmax(-1)]
        pooled = x[torch.arange(ids.shape[0]), ids.argmax(-1)]
        return pooled + x[:, 0] if self.pool == "end and first" else pooled


NOT_TRIMMED = [
    ({"causal": False}, "attention is not causal"),
    ({"pool": "first"}, "the output reads the same position of every text"),
    ({"pool": "last"}, "the output reads the same position of every text"),
    ({"pool": "mean"}, "mean"),
    ({"pool": "end and first"}, "combines different positions"),
    ({"flip": True}, "the graph differs from the whole model"),
]


@pytest.mark.parametrize(("options", "reason"), NOT_TRIMMED)
def test_towers_without_proof_keep_their_length(options: dict[str, Any], reason: str) -> None:
    model = _Text(**options).eval()
    ids = torch.randint(1, 50, (3, CONTEXT))
    gm = qwt_fx.capture(model, (ids,))
    info = graph_info(gm)
    assert reason in str(info.fixed_length)
    assert info.end_of_text is None
    assert trim(gm, ids) is ids
    torch.testing.assert_close(gm(ids), model(ids))


def test_a_mask_of_fixed_size_keeps_the_length() -> None:
    class Whole(_Text):
        def forward(self, ids: Tensor) -> Tensor:
            return (
                super().forward(ids)
                + 0 * self.mask.tril().sum(1)[ids.shape[1] - 1]
                + (self.places + self.table(ids)).sum() * 0
            )

    gm = qwt_fx.capture(Whole().eval(), (torch.randint(1, 50, (3, CONTEXT)),))
    assert "torch.export cannot capture Whole" in str(graph_info(gm).fixed_length)


def test_images_have_no_length() -> None:
    gm = qwt_fx.capture(nn.Linear(8, 8), (torch.randn(2, 3, 8),))
    assert graph_info(gm).fixed_length is None
    x = torch.randn(2, 3, 8)
    assert trim(gm, x) is x
    assert trim(nn.Linear(8, 8), x) is x


def test_the_end_is_found_by_the_models_own_rule() -> None:
    model = _Text("eos").eval()
    ids = torch.randint(8, 50, (2, CONTEXT))
    ids[0, 2], ids[1, 4] = 7, 7
    gm = qwt_fx.capture(model, (torch.randint(8, 50, (1, CONTEXT)),))  # without any end
    assert trim(gm, ids, multiple=1).shape == (2, 5)
    _close(gm(trim(gm, ids)), model(ids))


def test_a_rule_that_the_cut_changes_gives_the_batch_back_whole() -> None:
    gm = qwt_fx.capture(_Text("same as last").eval(), (torch.arange(CONTEXT)[None] % 4,))
    assert graph_info(gm).end_of_text is not None
    ids = torch.arange(1, CONTEXT + 1).repeat(2, 1)
    ids[0, 0] = ids[0, -1]  # ends at 0
    ids[1, 1] = ids[1, -1]  # ends at 1
    assert trim(gm, ids) is ids


def test_lengths_are_rounded_up_and_never_beyond_the_context(graph: GraphModule) -> None:
    lengths = [trim(graph, _texts(2, n), multiple=5).shape[1] for n in (3, 5, 6, 10, 11)]
    assert lengths == [5, 5, 10, 10, CONTEXT]
    empty = torch.zeros(0, CONTEXT, dtype=torch.int64)
    assert trim(graph, empty) is empty


def test_a_text_longer_than_the_context_is_refused(graph: GraphModule) -> None:
    with pytest.raises(DataError, match=r"wanted \(n, at most 12\)"):
        graph(torch.zeros(2, CONTEXT + 1, dtype=torch.int64))


def test_evaluation_runs_each_batch_at_its_own_length(graph: GraphModule, tower: TextTower) -> None:
    ids = torch.cat([_texts(4, 4), _texts(4, 9), _texts(4, CONTEXT)])
    seen: list[int] = []
    hook = graph.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    features = text_features(graph, ids, batch_size=4)
    hook.remove()
    assert seen == [4, 12, 12]
    _close(features, tower(ids))


def test_a_causal_flag_is_decomposed_for_any_length() -> None:
    class Flag(_Text):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids) + self.places[: ids.shape[1]]
            x = x + nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
            return x[torch.arange(ids.shape[0]), ids.argmax(-1)]

    model, ids = Flag().eval(), _texts(3, 6).clamp_max(49)
    gm = qwt_fx.capture(model, (ids,))
    assert len(DecomposeAttention()(gm).changes) == 1
    _close(gm(trim(gm, ids, multiple=1)), model(ids))


def test_graphs_stored_before_have_a_fixed_length(graph: GraphModule) -> None:
    document = json.loads(json.dumps(graph_to_json(graph)))
    tensors = {name: value.detach() for name, value in graph.state_dict().items()}
    tensors |= {n: b for n, b in graph.named_buffers() if n not in tensors}
    for key in ("end_of_text", "context_length", "fixed_length"):
        del document["info"][key]
    loaded = graph_from_json(document, tensors)
    ids = _texts(2, 5)
    assert trim(loaded, ids) is ids
    assert torch.equal(loaded(ids), graph(ids))


@pytest.mark.parametrize(
    "changes",
    [
        {"end_of_text": 3},
        {"end_of_text": "text"},
        {"end_of_text": "no_such_node"},
        {"end_of_text": None},
        {"context_length": 0},
        {"context_length": "12"},
    ],
)
def test_malformed_records_of_the_length_are_refused(
    graph: GraphModule, changes: dict[str, Any]
) -> None:
    document = json.loads(json.dumps(graph_to_json(graph)))
    document["info"] |= changes
    with pytest.raises(ArtifactError, match=r"end_of_text|context_length"):
        graph_from_json(document, {})
