"""Values that no model should have: the layer is named, or the result is finite and close."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import toys
from torch import Tensor
from torch.fx import GraphModule

import qwt_fx
from qwt_fx import QuantConfig, api
from qwt_fx.errors import DataError
from qwt_fx.measure.measure import sqnr_db

Edit = Callable[[Tensor], object]

# Both recipes, and every kind of compensation judged on the very samples that fitted it: 30 tokens
# or fewer for 16 channels and a constant make every Gram singular or nearly so.
CONFIGS = {
    "best": QuantConfig(),
    "repq-vit": QuantConfig(recipe="repq-vit"),
    **{
        f"{recipe} {kind}": QuantConfig(recipe=recipe, compensation=kind, hold_out=0.0)
        for recipe in ("best", "repq-vit")
        for kind in ("qwt", "int8", "affine", "lowrank:2")
    },
    "log2": QuantConfig(attention="log2"),
}


def configs(*names: str) -> pytest.MarkDecorator:
    """Each test for these configurations; only the first of them in the fast tier."""
    return pytest.mark.parametrize(
        "config",
        [
            pytest.param(CONFIGS[n], id=n, marks=() if n == names[0] else pytest.mark.slow)
            for n in names
        ],
    )


EVERY, RECIPES = configs(*CONFIGS), configs("best", "repq-vit")


@pytest.fixture(scope="module")
def short_tower() -> GraphModule:
    """The tower captured with sequences of one token."""
    return api.capture(toys.randomize(toys.Tower(layers=2)), (toys.tokens(3, length=1),))


def edited(tower: GraphModule, edits: dict[str, Edit]) -> GraphModule:
    """A copy of the captured tower with parameters changed in place."""
    gm = copy.deepcopy(tower)
    with torch.no_grad():
        for name, edit in edits.items():
            edit(gm.get_parameter(name))
    return gm


def run(
    tower: GraphModule, config: QuantConfig, edits: dict[str, Edit], x: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Outputs of the float and of the quantized graph."""
    batches = list(x) or list(toys.tokens(6).split(3))
    gm = edited(tower, edits)
    quantized = qwt_fx.quantize(gm, (batches[0],), batches, config)
    with torch.no_grad():
        outputs = [(gm(b), quantized(b)) for b in batches]
    return torch.cat([a for a, _ in outputs]), torch.cat([b for _, b in outputs])


LAYER = "blocks.0.fc1"


@RECIPES
@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{LAYER}.weight", math.nan),
        (f"{LAYER}.bias", math.inf),
        ("blocks.1.norm2.weight", -math.inf),
    ],
)
def test_a_parameter_that_is_not_finite_is_named(
    tower: GraphModule, config: QuantConfig, name: str, value: float
) -> None:
    def edit(p: Tensor) -> None:
        p.view(-1)[3] = value

    with pytest.raises(DataError, match=rf"^{name}: 1 of \d+ values of this parameter are NaN"):
        run(tower, config, {name: edit})


@RECIPES
def test_an_activation_that_is_not_finite_is_named(tower: GraphModule, config: QuantConfig) -> None:
    x = toys.tokens(6)
    x[0, 0, 0] = math.nan
    with pytest.raises(DataError, match=r"^blocks\.0\.(q|k|v)\.input: NaN or infinite"):
        run(tower, config, {}, x.split(3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwt", "int8", "affine", "lowrank:2"])
def test_a_later_batch_that_is_not_finite_never_reaches_a_compensation(
    tower: GraphModule, kind: str
) -> None:
    x = toys.tokens(6)
    x[5] = math.nan  # repq-vit looks for ranges in the first batch only
    config = QuantConfig(recipe="repq-vit", compensation=kind)
    with pytest.raises(DataError, match=r"^blocks\.0: NaN or infinite"):
        run(tower, config, {}, x.split(3))


# What is odd in each layer of one tower. At 8 bits a plain tower has 23 dB or more.
ODD: dict[str, dict[str, Edit]] = {
    "zeros": {
        f"{LAYER}.weight": Tensor.zero_,
        "blocks.1.fc1.weight": lambda p: p[3].zero_(),
        "blocks.1.fc2.weight": lambda p: p[:, 3].zero_(),
        "blocks.1.norm2.weight": lambda p: p[:3].zero_(),  # constant channels
    },
    "dead": {
        **{
            f"blocks.0.{n}": lambda p: p[:8].zero_()
            for n in ("q.weight", "k.weight", "v.weight", "q.bias", "v.bias")
        },
        "blocks.1.norm2.weight": Tensor.zero_,  # every channel is constant
    },
    "tiny": {
        f"{LAYER}.weight": lambda p: p.mul_(1e-30),
        "blocks.0.v.weight": lambda p: p.mul_(1e-40),  # denormal
        "blocks.1.norm1.weight": lambda p: p[:2].mul_(torch.tensor([1e-30, 1e-40])),
        "blocks.1.norm2.weight": lambda p: p.mul_(1e-30),
    },
}


@EVERY
@pytest.mark.parametrize("what", ODD)
def test_odd_weights_give_a_close_model(tower: GraphModule, config: QuantConfig, what: str) -> None:
    exact, rounded = run(tower, config, ODD[what])
    assert bool(torch.isfinite(rounded).all())
    assert sqnr_db(exact, rounded) > 19.0


@EVERY
def test_a_model_of_zeros_stays_zero(tower: GraphModule, config: QuantConfig) -> None:
    edits: dict[str, Edit] = {name: Tensor.zero_ for name, _ in tower.named_parameters()}
    exact, rounded = run(tower, config, edits)
    assert torch.equal(exact, rounded)
    assert float(rounded.abs().max()) == 0.0


@RECIPES
@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-30, 1e-40, 1e18])
def test_inputs_of_extreme_scale_behind_a_norm(
    tower: GraphModule, config: QuantConfig, scale: float
) -> None:
    exact, rounded = run(tower, config, {}, (toys.tokens(6) * scale).split(3))
    assert bool(torch.isfinite(rounded).all())
    assert sqnr_db(exact, rounded) > 19.0


HUGE: dict[str, dict[str, Edit]] = {
    "weights": {f"{LAYER}.weight": lambda p: p.mul_(1e30)},
    "activations": {"blocks.0.norm2.weight": lambda p: p.mul_(1e30)},
    "one channel": {"blocks.0.norm2.weight": lambda p: p[0].mul_(1e30)},
    "output": {"blocks.0.fc2.weight": lambda p: p.mul_(1e20)},
}


@RECIPES
@pytest.mark.parametrize("what", HUGE)
def test_values_that_overflow_are_refused_by_name(
    tower: GraphModule, config: QuantConfig, what: str
) -> None:
    with pytest.raises(DataError, match=r"^blocks\.[01]\.(fc1|fc2|q|k|v)(\.input)?: "):
        run(tower, config, HUGE[what])


@EVERY
@pytest.mark.parametrize(("samples", "length"), [(1, 1), (1, 5), (2, 5)])
def test_next_to_no_calibration_data(
    tower: GraphModule, short_tower: GraphModule, config: QuantConfig, samples: int, length: int
) -> None:
    """Batches of one sample; with one token of one sample every covariance is zero."""
    batches = toys.tokens(samples, seed=3)[:, :length].split(1)
    gm = tower if length == 5 else short_tower
    quantized = qwt_fx.quantize(gm, (batches[0],), list(batches), config)
    with torch.no_grad():
        exact = torch.cat([gm(b) for b in batches])
        rounded = torch.cat([quantized(b) for b in batches])
    assert bool(torch.isfinite(rounded).all())
    assert sqnr_db(exact, rounded) > 15.0  # on the very data it was calibrated with
