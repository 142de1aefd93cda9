"""Exported towers compute what the q/dq graph computes, from integers, wherever onnxruntime runs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_clip import small_config, small_model
from torch import Tensor, nn
from torch.fx import GraphModule
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.clip.towers import ImageTower, TextTower
from qwt_fx.errors import ArtifactError, ConfigError, MissingExtraError, PreconditionError
from qwt_fx.measure.kernel_audit import refuse_if_float
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.quant.fake_quant import fake_quant_of, is_fake_quant

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from qwt_fx.backends.onnx.onnx_runtime import audit, layer_reasons, onnx_runtime_session  # noqa: E402

CONTEXT = 12


def images(n: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


def texts(n: int = 8, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 49000, (n, CONTEXT), generator=generator)
    ids[:, 0] = 49406
    for row in range(n):
        end = 3 + row % (CONTEXT - 3)
        ids[row, end], ids[row, end + 1 :] = 49407, 0
    return ids


def quantized(tower: str, **fields: Any) -> tuple[GraphModule, Tensor]:
    sizes = small_config(vision_cfg={"layers": 1}, text_cfg={"layers": 2})
    model = small_model(sizes)
    batch = images() if tower == "image" else texts()
    module: nn.Module = ImageTower(model) if tower == "image" else TextTower(model)
    # Judged on the samples it is fitted on: these are too few for a held-out share.
    config = QuantConfig(hold_out=0.0, **fields)
    return qwt_fx.quantize(module, (batch,), [(batch,)], config), batch


def exported(q: GraphModule, batch: Tensor, folder: Path, tower: str, **options: Any) -> Path:
    path = folder / f"{tower}.onnx"
    qwt_fx.export(
        q, path, (batch[:1],), input_names=(tower,), output_names=(f"{tower}_features",), **options
    )
    return path


def assert_same(q: GraphModule, path: Path, *inputs: Tensor) -> None:
    session = onnx_runtime_session(path, threads=1)
    for x in inputs:
        with torch.no_grad():
            expected = q(x)
        got = session(x)
        assert got.shape == expected.shape
        assert sqnr_db(expected, got) > 60.0


SETTINGS = {
    "image best 8": ("image", {}),
    "image best 4, affine": (
        "image", {"w_bits": 4, "a_bits": 4, "compensation": "affine"}
    ),
    "image published 6, qwt, log2": (
        "image",
        {"recipe": "repq-vit", "w_bits": 6, "a_bits": 6, "compensation": "qwt", "attention": "log2"},
    ),
    "image published 8, low rank": (
        "image", {"recipe": "repq-vit", "compensation": "lowrank:3"}
    ),
    "text published 6, int8": (
        "text", {"recipe": "repq-vit", "w_bits": 6, "a_bits": 6, "compensation": "int8"}
    ),
    "text best 4, uniform": ("text", {"w_bits": 4, "a_bits": 4, "attention": "uniform"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_onnx_runtime_gives_the_graphs_features_from_integers(name: str, tmp_path: Path) -> None:
    tower, fields = SETTINGS[name]
    q, batch = quantized(tower, **fields)
    assert bool(qwt_fx.compensations(q)) == ("compensation" in fields)
    path = exported(q, batch, tmp_path, tower)
    if tower == "image":
        more = images(7, seed=2)
        assert_same(q, path, batch, more[:1], more, 4.0 * more)  # beyond every range
    else:
        more = texts(7, seed=2)
        assert_same(q, path, batch, more[:1], more, texts(3)[:, :8])
    kernels = {k.name: k for k in audit(path)}
    linears = ("conv1", "in_proj", "out_proj", "c_fc", "c_proj")
    chosen = [k for k in kernels.values() if k.name.endswith(linears)]
    assert len(chosen) == (5 if tower == "image" else 8)
    assert all(k.integer and k.kernel == "MatMulIntegerToFloat" for k in chosen)
    others = [k for k in kernels.values() if k not in chosen and not k.integer]
    assert all(k.reason and k.kernel != "not identified" for k in others)
    last = "visual.proj" if tower == "image" else "text_projection"
    assert kernels[last].kernel == "MatMul"
    assert kernels[last].reason == "its parameter is not quantized"
    if fields.get("attention") == "uniform":
        assert kernels["transformer.resblocks.0.attn.matmul2"].integer
    if fields.get("compensation") == "int8":
        assert any(k.integer for k in kernels.values() if k.name.endswith(".compensation"))


def test_the_file_holds_integers_names_and_nothing_of_this_machine(tmp_path: Path) -> None:
    q, batch = quantized("text", recipe="best", w_bits=8)
    path = exported(q, batch, tmp_path, "text")
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    (given,), (made,) = model.graph.input, model.graph.output
    assert (given.name, made.name) == ("text", "text_features")
    dims = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
    assert all(isinstance(d, str) for d in dims)  # samples and length
    floats = [
        i for i in model.graph.initializer
        if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) == 2
        and i.name not in ("text_projection", "positional_embedding") and 1 not in i.dims
        and not i.name.endswith("attn_mask")
    ]  # fmt: skip
    assert floats == []
    types = {i.name: i.data_type for i in model.graph.initializer}
    assert types["token_embedding_weight_codes"] == onnx.TensorProto.INT8
    assert types["transformer_resblocks_0_mlp_c_fc_onnx_codes"] == onnx.TensorProto.UINT8
    content = path.read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content
    width = 24
    weights = 2 * 12 * width**2 + 49408 * (width + 4)  # codes, embedding rows and their scales
    assert weights < len(content) < 1.1 * weights


def test_compensation_in_half_precision_stays_so_in_the_file(tmp_path: Path) -> None:
    # The exporter computes casts of small constants at once; those of real sizes stay in the file.
    sizes = small_config(vision_cfg={"layers": 1, "width": 128, "head_width": 32})
    batch = images()
    config = QuantConfig(w_bits=3, a_bits=3, compensation="qwt", hold_out=0.0)
    q = qwt_fx.quantize(ImageTower(small_model(sizes)), (batch,), [(batch,)], config)
    (block,) = qwt_fx.compensations(q)
    path = exported(q, batch, tmp_path, "image")
    assert_same(q, path, images(7, seed=2))
    half = [
        i for i in onnx.load(str(path)).graph.initializer
        if i.data_type == onnx.TensorProto.FLOAT16
    ]  # fmt: skip
    assert [list(i.dims) for i in half] == [[128, 128]]
    (kernel,) = [k for k in audit(path) if k.name == f"{block}.compensation"]
    assert not kernel.integer
    assert kernel.reason == "its parameter is not quantized"


def test_four_bit_weights_are_small_and_the_audit_calls_them_float(tmp_path: Path) -> None:
    q, batch = quantized("image", recipe="repq-vit", w_bits=4, a_bits=8)
    whole = exported(q, batch, tmp_path, "image")
    (tmp_path / "packed").mkdir()
    path = exported(q, batch, tmp_path / "packed", "image", pack="int4")
    codes = [i for i in onnx.load(str(path)).graph.initializer if "codes_4bit" in i.name]
    assert len(codes) == 5
    assert {i.data_type for i in codes} <= {onnx.TensorProto.UINT4, onnx.TensorProto.INT4}
    halves = sum(np.prod(i.dims) for i in codes) / 2
    # Zero points are packed, too.
    assert whole.stat().st_size - path.stat().st_size > 0.9 * halves
    assert_same(q, path, images(7, seed=2), 4.0 * images(1))
    kernels = audit(path)
    assert not any(k.integer for k in kernels)
    with pytest.raises(PreconditionError, match="floating point"):
        refuse_if_float(kernels, "image.onnx")


def test_int8_weights_everywhere_do_not_overflow_in_our_session(tmp_path: Path) -> None:
    q, batch = quantized("image", recipe="best")
    path = exported(q, batch, tmp_path, "image", pack="int8")
    initializers = onnx.load(str(path)).graph.initializer
    assert {i.data_type for i in initializers if i.name.endswith("codes")} == {
        onnx.TensorProto.INT8
    }
    assert not any(np.any(onnx.numpy_helper.to_array(i)) for i in initializers
                   if i.name.endswith("codes_zero_point"))  # fmt: skip
    assert_same(q, path, images(7, seed=2))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_alone_are_multiplied_by_activations_as_they_are(bits: int, tmp_path: Path) -> None:
    q, batch = quantized("image", recipe="repq-vit", w_bits=bits, a_bits=32)
    assert_same(q, exported(q, batch, tmp_path, "image"), batch, images(7, seed=2))


def test_a_module_called_twice_is_two_layers(tmp_path: Path) -> None:
    model = randomize(Tower(2))
    model.blocks[1].fc1, model.blocks[1].fc2 = model.blocks[0].fc1, model.blocks[0].fc2
    x = tokens(8)
    q = qwt_fx.quantize(model, (x,), [x], QuantConfig(recipe="repq-vit", symmetric_weights=True))
    path = tmp_path / "twice.onnx"
    qwt_fx.export(q, path, (x,))
    assert_same(q, path, x, tokens(3))
    names = [k.name for k in audit(path)]
    assert len(names) == len(set(names)) and {"blocks.1.fc2", "blocks.1.fc2@1"} <= set(names)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_that_two_layers_read_is_stored_once(bits: int, tmp_path: Path) -> None:
    model = randomize(Tower(2))
    model.blocks[1].out = model.blocks[0].out
    x, config = tokens(8), QuantConfig(bits, 32, recipe="repq-vit", symmetric_weights=True)
    q = qwt_fx.quantize(model, (x,), [x], config)
    path = tmp_path / "twice.onnx"
    qwt_fx.export(q, path, (x,), pack="int4" if bits == 4 else "auto")
    assert_same(q, path, x, tokens(3))
    stored = pytest.importorskip("onnx").load(str(path)).graph.initializer
    codes = [i.name for i in stored if "out_weight" in i.name]
    assert len([name for name in codes if "zero_point" not in name and "scale" not in name]) == 1


def test_scales_of_positions_multiply_the_integer_product(tmp_path: Path) -> None:
    model, x = randomize(Tower(layers=1)), tokens(3)
    prepared = qwt_fx.prepare(qwt_fx.capture(model, (x,)), QuantConfig(recipe="repq-vit"))
    prepared = qwt_fx.calibrate(prepared, [(x,)])
    length = x.shape[1]
    scale = torch.exp2(torch.arange(length) - 2.0)[:, None]
    for node in prepared.graph.nodes:
        if is_fake_quant(prepared, node) and "input" in fake_quant_of(prepared, node).name:
            fake_quant_of(prepared, node).token_scale = scale
    q = qwt_fx.convert(prepared)
    path = tmp_path / "tower.onnx"
    qwt_fx.export(q, path, x)
    assert_same(q, path, x[:1], tokens(7, seed=4))
    kernels = [k for k in audit(path) if not k.name.endswith(("matmul1", "matmul2"))]
    assert len(kernels) == 6
    assert all(k.integer for k in kernels)


class _Convolutions(nn.Module):
    """Patches that leave a border, then a convolution whose windows overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, kernel_size=(2, 3), stride=(2, 3))
        self.overlapping = nn.Conv2d(8, 4, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.overlapping(self.patches(x).relu())


def test_patches_are_products_of_integers_and_other_convolutions_say_why_not(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 9, 11)
    q = qwt_fx.quantize(_Convolutions().eval(), (x,), [(x,)], QuantConfig(recipe="repq-vit"))
    path = tmp_path / "c.onnx"
    qwt_fx.export(q, path, x)
    assert_same(q, path, x, 3.0 * x[:1])
    patches, overlapping = audit(path)
    assert patches.integer
    assert not overlapping.integer
    assert "overlap" in str(overlapping.reason)


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    model, x = randomize(Tower(layers=1)), tokens(3)
    published = QuantConfig(recipe="repq-vit", compat="original")
    q = qwt_fx.quantize(model, (x,), [(x,)], published)
    with pytest.raises(PreconditionError, match="cannot export"):
        qwt_fx.export(q, tmp_path / "a.onnx", x)
    prepared = qwt_fx.prepare(qwt_fx.capture(model, (x,)), QuantConfig())
    with pytest.raises(PreconditionError, match=r"qwt_fx\.convert"):
        qwt_fx.export(prepared, tmp_path / "a.onnx", x)
    with pytest.raises(ConfigError, match="torchscript"):
        qwt_fx.export(q, tmp_path / "a.onnx", x, format="torchscript")
    with pytest.raises(ConfigError, match=r"\.onnx"):
        qwt_fx.export(q, tmp_path / "a.pt2", x)
    with pytest.raises(ConfigError, match="int4"):
        qwt_fx.export(q, tmp_path / "a.pt2", x, format="pt2", pack="int4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnxscript", "onnx_ir"])
def test_without_the_extra_export_names_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, batch = quantized("image", recipe="repq-vit")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"qwt-fx\[onnx\]"):
        qwt_fx.export(q, tmp_path / "a.onnx", batch)
    assert list(tmp_path.iterdir()) == []


def test_without_the_extras_runtimes_name_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwt_fx.backends.onnx.openvino_runtime import openvino_model

    for package in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"qwt-fx\[onnx\]"):
        onnx_runtime_session(tmp_path / "a.onnx")
    with pytest.raises(MissingExtraError, match=r"qwt-fx\[openvino\]"):
        openvino_model(tmp_path / "a.onnx")


def test_openvino_computes_from_integers_and_agrees(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from qwt_fx.backends.onnx.openvino_runtime import openvino_model

    # 7 bits: no CPU can overflow.
    q, batch = quantized("image", recipe="best", w_bits=7)
    path = exported(q, batch, tmp_path, "image", pack="int8")
    model = openvino_model(path, threads=1)
    with torch.no_grad():
        assert (
            sqnr_db(q(batch), model(batch)) > 60.0
        )  # 45 in bfloat16, which is OpenVINO's own choice
    assert model.floats == "f32"
    kernels = {k.name: k for k in model.audit()}
    assert kernels["visual.transformer.resblocks.0.mlp.c_fc"].integer
    assert not kernels["visual.proj"].integer


class OpenVino:
    """Stands in for the package: a compiled graph of the nodes given."""

    def __init__(self, nodes: list[dict[str, str]], error: str = "") -> None:
        self.nodes, self.error = nodes, error

    def Core(self) -> OpenVino:
        return self

    def compile_model(self, path: str, device: str, options: dict[str, object]) -> OpenVino:
        self.options = options
        if self.error:
            raise RuntimeError(self.error)
        return self

    def get_runtime_model(self) -> OpenVino:
        return self

    def get_ordered_ops(self) -> list[Any]:
        return [SimpleNamespace(get_rt_info=lambda node=node: node) for node in self.nodes]


def test_the_audit_of_openvino_reads_the_compiled_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwt_fx.backends.onnx.openvino_runtime import openvino_model

    q, batch = quantized("image", recipe="repq-vit")
    path = exported(q, batch, tmp_path, "image", pack="int8")
    first, second, *_ = (k.name for k in audit(path) if k.integer)
    kind = {"layerType": "FullyConnected"}
    nodes = [
        kind | {"originalLayersNames": first, "primitiveType": "brgemm_avx512_i8"},
        kind | {"originalLayersNames": f"a,{second}", "primitiveType": "gemm_f32"},
        {"layerType": "Reorder", "originalLayersNames": "visual.proj", "primitiveType": "i8"},
    ]
    monkeypatch.setitem(sys.modules, "openvino", OpenVino(nodes))
    kernels = {k.name: k for k in openvino_model(path).audit()}
    assert kernels[first].integer
    assert kernels[first].kernel == "FullyConnected brgemm_avx512_i8"
    assert "OpenVINO computes it in floating point" in str(kernels[second].reason)
    assert kernels["visual.proj"].reason == "its parameter is not quantized"
    assert kernels["visual.proj"].kernel == "not identified"
    monkeypatch.setitem(sys.modules, "openvino", OpenVino([], "one line\nanother"))
    with pytest.raises(ArtifactError, match=r"OpenVINO cannot compile it: one line$"):
        openvino_model(path)


def test_openvinos_defaults_that_change_numbers_are_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwt_fx.backends.onnx.openvino_runtime import openvino_model

    q, batch = quantized("image", recipe="repq-vit")
    path = exported(q, batch, tmp_path, "image", pack="int8")
    stand_in = OpenVino([])
    monkeypatch.setitem(sys.modules, "openvino", stand_in)
    openvino_model(path, threads=2)
    assert stand_in.options == {
        "INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_NUM_THREADS": 2,
    }  # fmt: skip
    openvino_model(path, as_it_comes=True)
    assert stand_in.options == {}


def test_openvino_does_not_round_activations_beside_weights_alone(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from qwt_fx.backends.onnx.openvino_runtime import openvino_model

    q, batch = quantized("image", recipe="repq-vit", w_bits=4, a_bits=32)
    path = exported(q, batch, tmp_path, "image", pack="int8")
    with torch.no_grad():
        assert sqnr_db(q(batch), openvino_model(path, threads=1)(batch)) > 80.0


def test_models_of_others_have_no_audit() -> None:
    with pytest.raises(ArtifactError, match=r"a\.onnx: it was not exported by qwt-fx"):
        layer_reasons({"producer": "other"}, Path("a.onnx"))
