from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves
from toys import Sequence, Tower, observed, op_sequence, randomize, tokens

import qwt_fx
from qwt_fx.calibrate.observe_ranges import observe
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import NotCalibratedError
from qwt_fx.passes import InsertObservers, ReparameterizeLayerNorm
from qwt_fx.quant.fake_quant import Mode, fake_quant_nodes, fake_quant_of, set_mode


@given(seed=st.integers(0, 10_000), bits=st.sampled_from([4, 8]))
@settings(max_examples=10, deadline=None)
def test_function_is_unchanged_in_float64(seed: int, bits: int) -> None:
    model, x = randomize(Tower(2), seed).double(), tokens(seed=seed).double()
    gm = observed(model, x, QuantConfig(bits, bits))
    assert len(ReparameterizeLayerNorm()(gm).changes) == 4
    set_mode(gm, Mode.OFF)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-9, atol=1e-9)


def test_worked_example() -> None:
    """Scales 1 and 3, zero points 10 and 20: s~ = 2, z~ = 15, r1 = (0.5, 1.5), r2 = (-5, 5)."""

    class Model(Sequence):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x))

    model = Model(2)
    model.norm.weight.data = torch.tensor([1.0, 3.0])
    model.norm.bias.data = torch.tensor([2.0, 6.0])
    model.linear.weight.data = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    model.linear.bias.data = torch.tensor([100.0, 200.0])
    gm = observed(model, torch.randn(2, 3, 2))
    modules = [fake_quant_of(gm, n) for n in fake_quant_nodes(gm)]
    (module,) = [m for m in modules if m.spec.ch_axis == -1]
    module.set_qparams(torch.tensor([1.0, 3.0]), torch.tensor([10.0, 20.0]))
    ReparameterizeLayerNorm()(gm)
    norm = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default)[0]
    values = {
        k: dict(gm.named_parameters())[str(norm.args[i].target)] for k, i in (("w", 2), ("b", 3))
    }
    # gamma / r1; (beta + s r2) / r1 = (2 - 5) / 0.5, (6 + 15) / 1.5
    assert values["w"].tolist() == [2.0, 2.0]
    assert values["b"].tolist() == [-6.0, 14.0]
    weights = {tuple(p.shape): p for n, p in gm.named_parameters() if n.startswith("linear")}
    assert weights[(2, 2)].tolist() == [[0.5, 1.5], [0.0, 3.0]]
    # b - W (s r2), s r2 = (-5, 15)
    assert weights[(2,)].tolist() == [90.0, 170.0]
    assert module.scale.tolist() == [2.0, 2.0]
    assert module.zero_point.tolist() == [15.0, 15.0]


def test_zero_point_is_an_integer_in_range_unless_original() -> None:
    model, x = randomize(Tower(1)), tokens()
    for compat, recipe in (("none", "best"), ("original", "repq-vit")):
        gm = observed(model, x, QuantConfig(4, 4, compat=compat, recipe=recipe))
        before = [fake_quant_of(gm, n) for n in fake_quant_nodes(gm)]
        inputs = [m for m in before if m.spec.ch_axis == -1]
        means = [float(m.zero_point.mean()) for m in inputs]
        ReparameterizeLayerNorm()(gm)
        for module, mean in zip(inputs, means, strict=True):
            zero = float(module.zero_point[0])
            if compat == "none":
                assert zero == min(max(round(mean), 0), 15)
            else:
                assert zero == pytest.approx(mean)


def test_second_run_is_unmodified() -> None:
    gm = observed(randomize(Tower()), tokens())
    assert ReparameterizeLayerNorm()(gm).modified
    code = gm.code
    again = ReparameterizeLayerNorm()(gm)
    assert not again.modified
    assert "its channels agree already" in {s.reason for s in again.skips}
    assert gm.code == code


def test_op_sequence_stays() -> None:
    gm = observed(randomize(Tower()), tokens())
    before = sorted(op_sequence(gm))
    ReparameterizeLayerNorm()(gm)
    assert sorted(op_sequence(gm)) == before


def test_graph_without_observers_or_observation_is_refused() -> None:
    gm = qwt_fx.capture(Tower(), (tokens(),))
    with pytest.raises(NotCalibratedError, match="has no observers"):
        ReparameterizeLayerNorm()(gm)
    InsertObservers(QuantConfig())(gm)
    with pytest.raises(NotCalibratedError, match="has not been observed"):
        ReparameterizeLayerNorm()(gm)


class _Residual(Sequence):
    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return n + self.linear(n)


class _Matmul(Sequence):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) @ self.matrix + self.norm(x) @ self.matrix


class _Output(Sequence):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n = self.norm(x)
        return self.linear(n), n


class _Transposed(Sequence):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).transpose(1, 2))


class _Computed(Sequence):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.norm(x), self.linear.weight + 1.0) + self.other(x)


class _PostNorm(Sequence):
    """As in BERT: the norm's output is the next residual too."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x + self.other(x))
        return n + self.linear(torch.nn.functional.gelu(self.other(n)))


class _Grouped(Sequence):
    """A grouped convolution over the tokens reads the norm, as in XCiT's local interaction."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(16, 16, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2)


class _Padded(Sequence):
    """Zeros behind a norm are not its outputs: the new bias would turn them into something else."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.nn.functional.pad(self.norm(x), (0, 0, 0, 2)))


@pytest.mark.parametrize(
    ("model", "length", "reason"),
    [
        (_PostNorm(), 5, r"feeds add_1 \(aten\.add\.Tensor\), not a linear"),
        (_Grouped(), 5, "feeds transpose, which moves its last dimension"),
        (_Padded(), 5, r"feeds pad \(aten\.pad\.default\), not a linear"),
        (_Residual(), 5, r"feeds add \(aten\.add\.Tensor\), not a linear"),
        (_Matmul(), 5, r"feeds matmul_1 \(aten\.matmul\.default\), not a linear"),
        (_Output(), 5, "is an output of the model"),
        (_Transposed(), 16, "feeds transpose, which moves its last dimension"),
        (_Computed(), 5, "the weight of linear is computed"),
    ],
)
def test_near_misses_are_skipped_with_their_reason(
    model: Sequence, length: int, reason: str
) -> None:
    x = tokens(length=length)
    gm = observed(randomize(model), x)
    code = gm.code
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    result = ReparameterizeLayerNorm()(gm)
    assert not result.modified
    (skip,) = result.skips
    assert skip.node == "norm"
    assert re.search(reason, skip.reason), skip.reason
    assert gm.code == code
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())
    set_mode(gm, Mode.OFF)
    for exact, value in zip(tree_leaves(model(x)), tree_leaves(gm(x)), strict=True):
        assert torch.equal(value, exact)


def test_tied_linears_behind_two_norms_get_a_weight_each() -> None:
    class Model(Sequence):
        def __init__(self) -> None:
            super().__init__()
            self.second = torch.nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x)) + self.linear(self.second(x))

    model, x = randomize(Model()).double(), tokens().double()
    gm = observed(model, x)
    assert len(ReparameterizeLayerNorm()(gm).changes) == 2
    set_mode(gm, Mode.OFF)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-9, atol=1e-9)
    first, second = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert first.args[1] is not second.args[1]


def test_bias_put_together_from_parameters_moves_too() -> None:
    """BEiT and EVA concatenate the bias of q, a zero and the bias of v."""

    class Model(Sequence):
        def forward(self, x: Tensor) -> Tensor:
            bias = torch.cat([self.linear.bias[:8], self.other.bias[8:]])
            return torch.nn.functional.linear(self.norm(x), self.linear.weight, bias)

    model, x = randomize(Model()).double(), tokens().double()
    gm = observed(model, x)
    assert ReparameterizeLayerNorm()(gm).modified
    set_mode(gm, Mode.OFF)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-9, atol=1e-9)


def test_tied_weight_changes_for_the_norms_reader_only() -> None:
    class Model(Sequence):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x)) + torch.nn.functional.linear(x, self.linear.weight)

    model, x = randomize(Model()).double(), tokens().double()
    before = model.linear.weight.clone()
    gm = observed(model, x)
    assert ReparameterizeLayerNorm()(gm).modified
    set_mode(gm, Mode.OFF)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-9, atol=1e-9)
    assert torch.equal(model.linear.weight, before)


def test_missing_bias_is_added_and_weights_are_observed_again() -> None:
    gm = observed(randomize(Tower(1)), tokens())
    old = {m.name: m.scale for m in (fake_quant_of(gm, n) for n in fake_quant_nodes(gm))}
    ReparameterizeLayerNorm()(gm)
    new = {m.name: m.scale for m in (fake_quant_of(gm, n) for n in fake_quant_nodes(gm))}
    assert not torch.equal(new["blocks.0.k.weight"], old["blocks.0.k.weight"])
    assert torch.equal(new["blocks.0.out.weight"], old["blocks.0.out.weight"])
    k = next(n for n in gm.graph.nodes if n.meta.get("layer") == "blocks.0.k")
    assert k.args[2] is not None


def test_constant_channel_works_and_only_the_original_refuses_it() -> None:
    model, x = randomize(Tower(1)), tokens()
    model.blocks[0].norm1.weight.data[3] = 0.0  # type: ignore[union-attr, index]
    gm = observed(model, x)
    ReparameterizeLayerNorm()(gm)
    set_mode(gm, Mode.OFF)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-4)
    original = qwt_fx.capture(model, (x,))
    InsertObservers(QuantConfig(recipe="repq-vit", compat="original"))(original)
    with pytest.raises(qwt_fx.QwtError, match="a constant channel has no range"):
        observe(original, [x])
