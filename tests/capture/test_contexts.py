"""Contexts inside a model, and those that its caller has switched on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import Tower, op_sequence, randomize, tokens

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.errors import CaptureError
from qwt_fx.passes import InsertCompensation

Context = Callable[[], AbstractContextManager[object]]
WITHOUT_EFFECT: dict[str, Context] = {
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "autocast of another device": lambda: torch.autocast(
        "xpu", dtype=torch.bfloat16, enabled=False
    ),
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(True),
    "inference_mode": torch.inference_mode,
    "device": lambda: torch.device("cpu"),
}


class Inside(nn.Module):
    """A part under a context, a part of that under another, and an in-place operator in it."""

    def __init__(self, outer: Context, inner: Context) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)
        self.outer, self.inner = outer, inner

    def forward(self, x: Tensor) -> Tensor:
        with self.outer():
            y = self.norm(x)
            with self.inner():
                z = self.linear(y) + torch.ones(16)
                z += 1
            y = y * z
        return self.linear(y) + x


@pytest.mark.parametrize("inner", ["autocast off", "enable_grad"])
@pytest.mark.parametrize("outer", WITHOUT_EFFECT)
def test_parts_in_contexts_without_effect_are_put_in_line(outer: str, inner: str) -> None:
    model, x = Inside(WITHOUT_EFFECT[outer], WITHOUT_EFFECT[inner]), tokens()
    gm = qwt_fx.capture(model, (x,))
    with torch.no_grad():
        assert torch.equal(gm(x), model(x))
    products = [name for name in op_sequence(gm) if name in ("layer_norm", "linear", "mul")]
    assert products == ["layer_norm", "linear", "mul", "linear"]


def test_autocast_that_is_on_inside_a_model_is_refused_in_one_line() -> None:
    model = Inside(lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad)
    with pytest.raises(
        CaptureError, match=r"part under torch.autocast\('cpu', torch.bfloat16\).*enabled=False"
    ) as caught:
        qwt_fx.capture(model, (tokens(),))
    assert "\n" not in str(caught.value)


CALLERS: dict[str, Context] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("recipe", ["repq-vit", pytest.param("best", marks=pytest.mark.slow)])
def test_what_the_caller_has_switched_on_changes_nothing(
    caller: str, recipe: str, tmp_path: Path
) -> None:
    model, x = randomize(Tower(1)), tokens(8)
    config = QuantConfig(6, 6, recipe=recipe, compensation="qwt")
    wanted = qwt_fx.quantize(model, (x,), [x], config)
    with CALLERS[caller]():
        q = qwt_fx.quantize(model, (x,), [x], config)
    assert torch.equal(q(x), wanted(x))
    qwt_fx.save(q, tmp_path / "artifact")
    assert torch.equal(qwt_fx.load(tmp_path / "artifact")(x), wanted(x))
    q(x.clone().requires_grad_()).sum().backward()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("caller", CALLERS)
def test_steps_and_passes_alone_under_what_the_caller_has_switched_on(caller: str) -> None:
    model, x = randomize(Tower(1)), tokens(8)
    floating = qwt_fx.capture(model, (x,))

    def steps() -> Tensor:
        prepared = qwt_fx.prepare(qwt_fx.capture(model, (x,)), QuantConfig(4, 4, recipe="repq-vit"))
        qwt_fx.observe(prepared, [x])
        InsertCompensation(reference=floating, batches=[x], kind="qwt")(prepared)
        return qwt_fx.convert(prepared)

    wanted = steps()(x)
    with CALLERS[caller]():
        q = steps()
    assert torch.equal(q(x), wanted)


def test_a_model_made_in_inference_mode_gives_a_graph_for_gradients_too(tmp_path: Path) -> None:
    with torch.inference_mode():
        model, x = randomize(Tower(1)), tokens(8)
        q = qwt_fx.quantize(model, (x,), [x], QuantConfig(recipe="repq-vit"))
    x = x.clone()
    assert torch.equal(q(x), qwt_fx.quantize(model, (x,), [x], QuantConfig(recipe="repq-vit"))(x))
    q(x.requires_grad_()).sum().backward()
    qwt_fx.save(q, tmp_path / "artifact")
    with torch.inference_mode():
        loaded = qwt_fx.load(tmp_path / "artifact")
    assert not any(tensor.is_inference() for tensor in loaded.state_dict().values())
