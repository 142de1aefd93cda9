"""Lowering for CUDA, run on the CPU: the graph's outputs, what it is made of, what it says of it."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small_clip import small_config, small_model
from torch import Tensor, nn
from torch.fx import GraphModule
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.backends import backend_for
from qwt_fx.backends.cuda.int8_gemm import INT8_LINEAR
from qwt_fx.backends.lowering import LAYERS
from qwt_fx.clip.clip import ImageTower, TextTower
from qwt_fx.errors import ConfigError, PreconditionError
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.quant.fake_quant import fake_quant_nodes, fake_quant_of
from qwt_fx.text.text_length import trim

TOWERS = ("image", "text")
PARITY_DB = 40.0
_ACTIVATIONS = {"gelu": {}, "quick_gelu": {"quick_gelu": True}}


def _inputs(tower: str, count: int = 6, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if tower == "image":
        return torch.randn(count, 3, 16, 24, generator=generator)
    ids = torch.zeros(count, 12, dtype=torch.int64)
    ids[:, 0] = 62
    for i, row in enumerate(ids):
        row[1 : 3 + i % 8] = torch.randint(1, 60, (2 + i % 8,), generator=generator)
        row[3 + i % 8] = 63
    return ids


@cache
def _captured(tower: str, activation: str = "gelu") -> GraphModule:
    config = small_config(text_cfg={"vocab_size": 64}, **_ACTIVATIONS[activation])
    model = small_model(config)
    module = ImageTower(model) if tower == "image" else TextTower(model)
    return qwt_fx.capture(module, (_inputs(tower),))


def _quantized(
    graph: GraphModule, tower: str, *, recipe: str = "repq-vit", **fields: Any
) -> GraphModule:
    batch = _inputs(tower)
    fields["recipe"] = recipe
    return qwt_fx.quantize(graph, (batch,), [(batch,)], QuantConfig(**fields))


def _parity(q: GraphModule, lowered: GraphModule, *inputs: Tensor) -> float:
    with torch.no_grad():
        expected, got = q(*inputs), lowered(*inputs)
    assert got.dtype is expected.dtype
    assert got.shape == expected.shape
    return sqnr_db(expected.float(), got.float())


def _calls(gm: GraphModule) -> list[Any]:
    return [n for n in gm.graph.nodes if n.target is INT8_LINEAR]


CASES = [
    *(
        ("repq-vit", kind, bits, t)
        for kind in ("qwt", "int8")
        for bits in (8, 6, 4)
        for t in TOWERS
    ),
    ("best", "int8", 8, "image"),  # the layer walk takes its seconds
    ("best", "int8", 4, "text"),
]


@pytest.mark.parametrize(("recipe", "compensation", "bits", "tower"), CASES)
def test_outputs_are_those_of_the_graph(
    recipe: str, compensation: str, bits: int, tower: str
) -> None:
    q = _quantized(
        _captured(tower), tower,
        w_bits=bits, a_bits=bits, recipe=recipe, compensation=compensation, hold_out=0.0,
    )  # fmt: skip
    before = q.code
    lowered = qwt_fx.lower(q, "cuda")
    assert q.code == before
    saturating = _inputs(tower, 9, seed=8)
    saturating = saturating * 5.0 if tower == "image" else saturating
    assert _parity(q, lowered, _inputs(tower)) > PARITY_DB
    assert _parity(q, lowered, saturating) > PARITY_DB
    kernels = backend_for("cuda").audit(lowered)
    floating = {k.name.rsplit(".", 1)[-1]: k.reason for k in kernels if not k.integer}
    dense = {"compensation"} if compensation == "qwt" else set()
    assert set(floating) - dense == {"attn", "proj" if tower == "image" else "text_projection"}
    assert "product of activations" in str(floating.pop("attn"))
    assert set(floating.values()) == {"its parameter is not quantized"}
    assert not any("dequantize" in str(n.target) for n in lowered.graph.nodes)


@pytest.mark.parametrize("activation", _ACTIVATIONS)
def test_activation_and_next_quantizer_are_in_the_epilogue(activation: str) -> None:
    q = _quantized(_captured("image", activation), "image")
    lowered = qwt_fx.lower(q, "cuda")
    assert _parity(q, lowered, _inputs("image")) > PARITY_DB
    kernels = {k.name: k.kernel for k in backend_for("cuda").audit(lowered)}
    name = "visual.transformer.resblocks.1.mlp.c_fc"
    assert kernels[name] == f"qwt_fx::int8_linear, Triton + {activation} + quantize"
    assert kernels["visual.conv1"] == "qwt_fx::int8_linear, Triton"
    left = {str(n.target) for n in lowered.graph.nodes}
    assert not left & {"aten.gelu.default", "aten.sigmoid.default", "aten.conv2d.default"}


def test_linears_of_one_value_are_one_product() -> None:
    """q, k and v, and an int8 compensation of the same codes; k has no bias."""
    x = tokens(8, 9)
    config = QuantConfig(recipe="repq-vit", compensation="int8", hold_out=0.0)
    q = qwt_fx.quantize(randomize(Tower(2)), (x,), [x], config)
    lowered = qwt_fx.lower(q, "cuda")
    assert _parity(q, lowered, x) > PARITY_DB
    applied = set(qwt_fx.compensations(q))
    assert applied
    groups = [n.meta[LAYERS] for n in _calls(lowered)]
    for block in ("blocks.0", "blocks.1"):
        names = [f"{block}.{n}" for n in "qkv"]
        names += [f"{block}.compensation"] if block in applied else []
        assert sorted(names) in [sorted(g) for g in groups]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", [(-1, 1), (-1, 1, 1)])
def test_positions_with_scales_of_their_own(shape: tuple[int, ...], precision: str) -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = Tower(1)

        def forward(self, x: Tensor) -> Tensor:  # (length, n, channels) inside
            norm, linear = self.tower.norm_pre, self.tower.blocks[0].fc1
            return nn.functional.gelu(linear(norm(x.transpose(0, 1)))).transpose(0, 1)

    x = tokens(4, 9)
    model = randomize(Tower(1) if len(shape) == 2 else Transposed())
    prepared = qwt_fx.prepare(qwt_fx.capture(model, (x,)), QuantConfig(recipe="repq-vit"))
    qwt_fx.calibrate(prepared, [x])
    for node in fake_quant_nodes(prepared):
        module = fake_quant_of(prepared, node)
        if module.spec.ch_axis is None:
            values = [4.0, 0.5, 1.0, 2.0, 1.0, 1.0, 0.25, 1.0, 8.0]
            module.token_scale = torch.tensor(values).reshape(shape)
    q = qwt_fx.convert(prepared)
    lowered = qwt_fx.lower(q, "cuda", precision=precision)
    wanted = {"fp32": PARITY_DB, "fp16": 36.0, "bf16": 26.0}[precision]
    assert _parity(q, lowered, x) > wanted
    assert _parity(q, lowered, tokens(2, 9, seed=5)) > wanted
    assert _calls(lowered)
    assert all(n.args[5] is not None for n in _calls(lowered))


def test_patches_that_do_not_cover_the_image() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 10, (4, 2), stride=(4, 2))
            self.overlapping = nn.Conv2d(10, 6, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.overlapping(self.conv(x))

    x = torch.randn(4, 3, 11, 9, generator=torch.Generator().manual_seed(0))
    q = qwt_fx.quantize(Patches().eval(), (x,), [x], QuantConfig(recipe="repq-vit"))
    lowered = qwt_fx.lower(q, "cuda")
    assert _parity(q, lowered, x) > PARITY_DB
    kernels = {k.name: k for k in backend_for("cuda").audit(lowered)}
    assert kernels["conv"].integer
    assert not kernels["overlapping"].integer
    assert "windows overlap" in str(kernels["overlapping"].reason)


def test_int_mm_takes_the_sizes_it_can_and_the_audit_says_which() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.even, self.odd = nn.Linear(16, 24), nn.Linear(24, 13)

        def forward(self, x: Tensor) -> Tensor:
            return self.odd(torch.relu(self.even(x)))

    x = tokens(4, 9)
    q = qwt_fx.quantize(Two().eval(), (x,), [x], QuantConfig(recipe="repq-vit"))
    backend = backend_for("cuda", gemm="int_mm")
    lowered = backend.lower(q)
    assert _parity(q, lowered, x) > PARITY_DB
    kernels = {k.name: k.kernel for k in backend.audit(lowered)}
    assert kernels["even"] == "qwt_fx::int8_linear, torch._int_mm (Triton up to 16 rows)"
    assert kernels["odd"] == "qwt_fx::int8_linear, Triton"


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_between_the_integer_layers(tower: str, precision: str) -> None:
    q = _quantized(_captured(tower), tower, compensation="qwt", hold_out=0.0)
    lowered = qwt_fx.lower(q, "cuda", precision=precision)
    x = _inputs(tower)
    # Rounding a value to half precision moves some over the boundary of two codes.
    assert _parity(q, lowered, x) > {"fp16": 36.0, "bf16": 28.0}[precision]
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    seen: set[Any] = set()

    class Spy(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if "scaled_dot" in str(n.target) or n.target is torch.ops.aten.layer_norm.default:
                seen.add(value.dtype)
            return value

    with torch.no_grad():
        Spy(lowered).run(x)
    assert seen == {wanted}
    floats = {n.args[8] for n in _calls(lowered)} - {torch.int8}
    assert floats == {wanted}


@pytest.mark.parametrize("kind", ["moved", "shifted", "normalized", "attended"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_inputs_reach_half_precision_behind_what_passes_them_on(kind: str, precision: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 24)
            self.positions = nn.Parameter(0.1 * torch.randn(9, 16))

        def forward(self, x: Tensor) -> Tensor:
            if kind == "attended":
                x = nn.functional.scaled_dot_product_attention(x, x, x)
            elif kind == "moved":
                x = x.transpose(0, 1).chunk(3, dim=0)[0].transpose(0, 1)
            else:
                x = (x - 0.5) / 2.0 if kind == "normalized" else x + self.positions
            return self.linear(self.norm(x))

    x = tokens(4, 9)
    q = qwt_fx.quantize(Model().eval(), (x,), [x], QuantConfig(recipe="repq-vit"))
    assert _parity(q, qwt_fx.lower(q, "cuda", precision=precision), x) > 30.0


@pytest.mark.parametrize("overrides", [{}, {"*.0.mlp.c_fc": "skip", "*.1.attn.in_proj": "w8a16"}])
def test_a_half_precision_model_keeps_its_dtype(overrides: dict[str, str]) -> None:
    model = copy.deepcopy(small_model()).to(torch.bfloat16)
    x = _inputs("image")
    config = QuantConfig(recipe="repq-vit", overrides=overrides)
    q = qwt_fx.quantize(ImageTower(model), (x,), [x], config)
    lowered = qwt_fx.lower(q, "cuda")
    assert _parity(q, lowered, x) > 35.0
    assert len(_calls(lowered)) == 9 - len(overrides)
    with pytest.raises(PreconditionError, match=r"computes in torch.bfloat16, wanted a float32"):
        qwt_fx.lower(q, "cuda", precision="fp16")


def test_an_artifact_lowers_to_the_same(tmp_path: Path) -> None:
    q = _quantized(_captured("image"), "image", compensation="int8", hold_out=0.0)
    qwt_fx.save(q, tmp_path / "a")
    x = _inputs("image")
    loaded = qwt_fx.lower(qwt_fx.load(tmp_path / "a"), "cuda", precision="bf16")
    assert torch.equal(loaded(x), qwt_fx.lower(q, "cuda", precision="bf16")(x))


@pytest.mark.parametrize("tower", TOWERS)
def test_the_lowered_graph_compiles_exports_and_copies(tower: str) -> None:
    q = _quantized(_captured(tower), tower)
    lowered, x = qwt_fx.lower(q, "cuda"), _inputs(tower)
    with torch.no_grad():
        expected = lowered(x)
        assert torch.equal(copy.deepcopy(lowered)(x), expected)
        compiled = torch.compile(lowered, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        exported = torch.export.export(lowered, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_trimmed_texts_with_positions_of_their_own_scale(precision: str) -> None:
    prepared = qwt_fx.prepare(_captured("text"), QuantConfig(recipe="repq-vit"))
    x = _inputs("text")
    qwt_fx.calibrate(prepared, [x])
    changed = 0
    for node in fake_quant_nodes(prepared):
        if node.args[0].target is torch.ops.aten.layer_norm.default:  # (n, length, channels)
            scales = 2.0 ** torch.tensor([2, -1, 0, 1] * 3)
            fake_quant_of(prepared, node).token_scale = scales[:, None]
            changed += 1
    assert changed
    q = qwt_fx.convert(prepared)
    lowered = qwt_fx.lower(q, "cuda", precision=precision)
    assert sum(n.args[5] is not None for n in _calls(lowered)) >= changed
    short = trim(lowered, x[:3])
    assert short.shape[1] < x.shape[1]
    assert _parity(q, lowered, short) > (PARITY_DB if precision == "fp32" else 36.0)
    with torch.no_grad():
        assert sqnr_db(lowered(x[:3]), lowered(short)) > 30.0


def test_log2_attention_stays_in_floating_point() -> None:
    q = _quantized(_captured("image"), "image", attention="log2")
    x = _inputs("image")
    assert _parity(q, qwt_fx.lower(q, "cuda"), x) > PARITY_DB
    # Half precision moves attention weights to the code beside; the graph must run all the same.
    assert _parity(q, qwt_fx.lower(q, "cuda", precision="fp16"), x) > 20.0


def test_bad_options_and_graphs_are_refused() -> None:
    graph = _captured("image")
    q = _quantized(graph, "image", compat="original")
    with pytest.raises(PreconditionError, match="cannot lower"):
        qwt_fx.lower(q, "cuda")
    with pytest.raises(PreconditionError, match="not converted"):
        qwt_fx.lower(qwt_fx.prepare(graph, QuantConfig()), "cuda")
    with pytest.raises(ConfigError, match="precision: got 'int8', wanted one of fp32"):
        qwt_fx.lower(q, "cuda", precision="int8")
    with pytest.raises(ConfigError, match="gemm: got 'cutlass', wanted one of triton, int_mm"):
        qwt_fx.lower(q, "cuda", gemm="cutlass")
    with pytest.raises(ConfigError, match="'cuda': got option 'threads', wanted precision, gemm"):
        qwt_fx.lower(q, "cuda", threads=2)
    with pytest.raises(ConfigError, match="'eager': got option 'precision', wanted none"):
        qwt_fx.lower(q, "eager", precision="fp16")


def test_the_audit_of_the_graph_itself_is_all_floating_point() -> None:
    q = _quantized(_captured("image"), "image")
    for name in ("eager", "cuda"):
        kernels = backend_for(name).audit(q)
        assert len(kernels) == 12
        assert not any(k.integer for k in kernels)
        assert all(k.reason for k in kernels)


@pytest.mark.gpu
@pytest.mark.parametrize("gemm", ["triton", "int_mm"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("recipe", ["best", "repq-vit"])
def test_a_gpu_computes_what_the_graph_does(tower: str, recipe: str, gemm: str) -> None:
    q = _quantized(_captured(tower), tower, recipe=recipe).cuda()
    x = _inputs(tower, 40).cuda()
    lowered = qwt_fx.lower(q, "cuda", precision="fp32", gemm=gemm)
    assert _parity(q, lowered, x) > PARITY_DB
    assert qwt_fx.lower(q, "cuda", precision="fp16")(x).dtype is torch.float32


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("gemm", ["triton", "int_mm"])
def test_a_gpu_runs_it_compiled_with_cuda_graphs(gemm: str) -> None:
    q = _quantized(_captured("image"), "image").cuda()
    lowered = qwt_fx.lower(q, "cuda", gemm=gemm)
    compiled = torch.compile(lowered, mode="max-autotune", fullgraph=True)
    with torch.no_grad():
        for count in (1, 40):
            x = _inputs("image", count).cuda()
            for _ in range(3):
                got = compiled(x).clone()
            assert sqnr_db(q(x).float(), got.float()) > 35.0
