"""What every pass and the manager promise: order, records, and errors that say where they arose."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from toys import Block, op_sequence, tokens

import qwt_fx
from qwt_fx.errors import (
    NotCalibratedError,
    PassError,
    PostconditionError,
    PreconditionError,
    QwtError,
)
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.pass_base import Change, Pass, PassManager, Skip

aten = torch.ops.aten


@dataclass(frozen=True)
class NegateRelu(Pass):
    """Each relu's readers read its negative; a relu named in `skipped` is left as it is."""

    skipped: tuple[str, ...] = ()

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        for node in gm.graph.find_nodes(op="call_function", target=aten.relu.default):
            if node.name in self.skipped:
                yield Skip(node.name, "asked for")
                continue
            with gm.graph.inserting_after(node):
                negated = gm.graph.call_function(aten.neg.default, (node,))
            node.replace_all_uses_with(negated, delete_user_cb=lambda u, n=negated: u is not n)
            yield Change(node.name, "negated")


class SecondNegation(NegateRelu):
    must_follow: ClassVar[tuple[str, ...]] = ("NegateRelu", "Recorder")


@dataclass(frozen=True)
class Recorder(Pass):
    """Says in which order its methods are called; raises in the one named."""

    raising: str = ""
    error: Exception = field(default_factory=lambda: PassError("broken"))
    called: list[str] = field(default_factory=list, compare=False)

    def _note(self, method: str) -> None:
        self.called.append(method)
        if method == self.raising:
            raise self.error

    def requires(self, gm: GraphModule) -> None:
        self._note("requires")

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        self._note("apply")
        yield Skip("graph", "looked at")

    def ensures(self, gm: GraphModule) -> None:
        self._note("ensures")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        self.linear.weight.data = torch.tensor([[1.0, 2.0], [3.0, -4.0]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu() + 1.0


X = torch.tensor([[1.0, 1.0], [-1.0, 0.5]])  # the linear gives (3, -1) and (0, -5)


@pytest.fixture
def gm() -> GraphModule:
    return qwt_fx.capture(Model(), (X,))


def test_a_pass_rewrites_the_graph_it_is_given_and_records_what_it_did(gm: GraphModule) -> None:
    result = NegateRelu()(gm)
    assert result.graph_module is gm
    assert gm(X).tolist() == [[-2.0, 1.0], [1.0, 1.0]]  # recompiled, too
    assert op_sequence(gm) == ["linear", "relu", "neg", "add"]
    assert (result.changes, result.skips) == ((Change("relu", "negated"),), ())
    assert graph_info(gm).passes == [
        {"pass": "NegateRelu", "changes": [["relu", "negated"]], "skips": []}
    ]


def test_modified_is_what_the_changes_say(gm: GraphModule) -> None:
    code = gm.code
    skipping = NegateRelu(skipped=("relu",))(gm)
    assert skipping.skips == (Skip("relu", "asked for"),)
    assert not skipping.modified and gm.code == code
    assert NegateRelu()(gm).modified and gm.code != code
    assert [len(record["skips"]) for record in graph_info(gm).passes] == [1, 0]


def test_what_nothing_reads_any_more_goes_with_a_change(gm: GraphModule) -> None:
    class Bypass(NegateRelu):
        def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
            (node,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
            node.replace_all_uses_with(node.args[0])
            yield Change(node.name, "bypassed")

    Bypass()(gm)
    assert op_sequence(gm) == ["relu", "add"]
    assert not gm.state_dict() and not hasattr(gm, "linear")
    assert gm(X).tolist() == [[2.0, 2.0], [1.0, 1.5]]


def test_requirements_come_before_the_rewriting_and_promises_after_it(gm: GraphModule) -> None:
    step = Recorder()
    step(gm)
    assert step.called == ["requires", "apply", "ensures"]


@pytest.mark.parametrize(
    ("method", "called"),
    [
        ("requires", ["requires"]),
        ("apply", ["requires", "apply"]),
        ("ensures", ["requires", "apply", "ensures"]),
    ],
)
def test_a_pass_that_failed_is_not_recorded(
    gm: GraphModule, method: str, called: list[str]
) -> None:
    step = Recorder(method)
    with pytest.raises(PassError, match="broken"):
        step(gm)
    assert step.called == called
    assert graph_info(gm).passes == []


def test_a_pass_names_those_it_must_follow(gm: GraphModule) -> None:
    code = gm.code
    with pytest.raises(PreconditionError) as caught:
        SecondNegation()(gm)
    assert str(caught.value) == (
        "SecondNegation must follow NegateRelu, Recorder; passes run so far: none"
    )
    assert gm.code == code
    NegateRelu()(gm)
    with pytest.raises(PreconditionError) as caught:
        SecondNegation()(gm)
    assert str(caught.value) == (
        "SecondNegation must follow Recorder; passes run so far: NegateRelu"
    )
    Recorder()(gm)
    assert SecondNegation()(gm).modified


def test_a_manager_runs_its_steps_in_order_and_returns_a_result_for_each(gm: GraphModule) -> None:
    results = PassManager((NegateRelu(), Recorder(), SecondNegation()))(gm)
    assert [r.modified for r in results] == [True, False, True]
    assert [r["pass"] for r in graph_info(gm).passes] == [
        "NegateRelu",
        "Recorder",
        "SecondNegation",
    ]
    assert gm(X).tolist() == [[4.0, 1.0], [1.0, 1.0]]  # negated twice
    assert PassManager(())(gm) == ()


@pytest.mark.parametrize(
    "kind", [PassError, PreconditionError, PostconditionError, NotCalibratedError]
)
@pytest.mark.parametrize("method", ["requires", "apply", "ensures"])
def test_a_failure_keeps_its_type_and_cause_and_names_the_pass_and_those_before(
    gm: GraphModule, kind: type[PassError], method: str
) -> None:
    original = kind("node relu: got 3, wanted 4")
    last = Recorder()
    steps = (NegateRelu(), NegateRelu(skipped=("relu",)), Recorder(method, original), last)
    with pytest.raises(QwtError) as caught:
        PassManager(steps)(gm)
    assert type(caught.value) is kind
    assert caught.value.__cause__ is original
    assert str(caught.value) == (
        "Recorder: node relu: got 3, wanted 4 (passes already run: NegateRelu, NegateRelu)"
    )
    assert last.called == []  # nothing runs behind a failure
    assert [r["pass"] for r in graph_info(gm).passes] == ["NegateRelu", "NegateRelu"]


def test_a_failure_of_the_first_pass_says_that_none_has_run(gm: GraphModule) -> None:
    with pytest.raises(PassError, match=r"^Recorder: broken \(passes already run: none\)$"):
        PassManager((Recorder("apply"), NegateRelu()))(gm)


def test_an_error_that_is_no_passs_own_goes_through_as_it_is(gm: GraphModule) -> None:
    """A bug, or bad data, is not dressed up as a graph that does not fit."""
    for error in (ZeroDivisionError("bug"), qwt_fx.errors.DataError("NaN in batch 3")):
        with pytest.raises(type(error)) as caught:
            PassManager((NegateRelu(), Recorder("apply", error)))(gm)
        assert caught.value is error


@dataclass(frozen=True)
class DropHalving(Pass):
    """x * 0.5 -> x, the obvious way: the product's name goes with it."""

    in_place: bool = False

    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        for node in list(gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)):
            if self.in_place:
                node.target, node.args = aten.relu.default, (node.args[0],)
            else:
                node.replace_all_uses_with(node.args[0])
            yield Change(node.name, "dropped")


class HalvedBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(HalvedBlock() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class HalvedBlock(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


def test_a_pass_that_takes_away_a_node_that_the_records_name_is_refused() -> None:
    gm = qwt_fx.capture(HalvedBlocks().eval(), (tokens(2),))
    ends = [b.output for b in graph_info(gm).blocks]
    assert len(ends) == 2 and all(end.startswith("mul") for end in ends)
    DropHalving(in_place=True)(copy.deepcopy(gm))
    with pytest.raises(PostconditionError) as error:
        DropHalving()(gm)
    assert str(error.value) == (
        f"DropHalving: GraphInfo names the node {ends[0]!r} (block blocks.0), which the pass has "
        "taken out of the graph; rewrite that node in place, or tell Correspondence.replaced what "
        "stands for it"
    )
    assert [record["pass"] for record in graph_info(gm).passes] == []
