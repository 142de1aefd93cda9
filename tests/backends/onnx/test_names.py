"""Outputs are called as the model calls them, and given names must be as many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import WIDTH, tokens

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.backends.onnx.names import input_names, output_names
from qwt_fx.errors import ConfigError


class Returns(nn.Module):
    """Two linears of one input, returned in a structure of the test's choice."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 6)
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.first(x), self.second(x))


def graph(make: Any) -> Any:
    return qwt_fx.capture(Returns(make).eval(), (tokens(2),))


def huggingface(a: Tensor, b: Tensor) -> Any:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    return outputs.BaseModelOutputWithPooling(last_hidden_state=a, pooler_output=b)


def nested(a: Tensor, b: Tensor) -> Any:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    return outputs.BaseModelOutput(last_hidden_state=a, hidden_states=(a, b))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda a, b: a, None),
        (lambda a, b: (a, b), None),
        (lambda a, b: {"tokens": a, "pooled": b}, ["tokens", "pooled"]),
        (lambda a, b: {"deep": [a, {"er": b}]}, ["deep_0", "deep_1_er"]),
        (lambda a, b: (a, {"pooled": b}), None),
        (huggingface, ["last_hidden_state", "pooler_output"]),
        (nested, ["last_hidden_state", "hidden_states_0", "hidden_states_1"]),
    ],
)
def test_names_come_from_the_fields(make: Any, names: list[str] | None) -> None:
    assert output_names(graph(make), None) == names


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            ("features",),
            "output_names: got 1 (features), wanted 2, one each for last_hidden_state, pooler_output",
        ),
        (("a", "b", "c"), "output_names: got 3 (a, b, c), wanted 2"),
        (("a", "a"), "output_names: got a, a, wanted names that differ"),
    ],
)
def test_another_number_of_names_is_refused(given: tuple[str, ...], problem: str) -> None:
    gm = graph(huggingface)
    with pytest.raises(ConfigError) as error:
        output_names(gm, given)
    assert problem in str(error.value)
    assert output_names(gm, ("a", "b")) == ["a", "b"]
    with pytest.raises(ConfigError, match=r"input_names: got 2 \(a, b\), wanted 1, one each for x"):
        input_names(gm, ("a", "b"))
    with pytest.raises(ConfigError, match="wanted 2, one each for output 0, output 1"):
        output_names(graph(lambda a, b: (b, a)), ("features",))


def test_the_file_calls_the_right_tensor_by_its_field(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    model, x = Returns(huggingface).eval(), tokens(4)
    q = qwt_fx.quantize(model, (x,), [x], QuantConfig(recipe="repq-vit"))
    path = tmp_path / "model.onnx"
    with pytest.raises(ConfigError):
        qwt_fx.export(q, path, x, output_names=("features",))
    assert not path.exists()
    qwt_fx.export(q, path, x)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == ["last_hidden_state", "pooler_output"]
    (pooled,) = session.run(["pooler_output"], {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(pooled), q(x).pooler_output, atol=1e-4, rtol=1e-4)
