"""The pass contract: a pass has fields (its configuration), keeps no state, and reports what it did.

`__call__` runs `requires`, `apply`, clean-up and `ensures(result)`; `apply` rewrites the graph in
place and yields a `Change` or a `Skip` with its reason for every site it looked at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from qwt_fx.errors import PassError, PostconditionError, PreconditionError
from qwt_fx.graph.conditions import plain_conditions
from qwt_fx.graph.dead_code import remove_dead_code
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.graph_source import recompile


@dataclass(frozen=True)
class Change:
    """A site that was rewritten, and how."""

    node: str
    what: str


@dataclass(frozen=True)
class Skip:
    """A site that was left exactly as it was, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What a pass did to the graph it was given (the same object, rewritten in place)."""

    graph_module: GraphModule
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]

    @property
    def modified(self) -> bool:
        """Whether anything changed."""
        return bool(self.changes)


class Pass(ABC):
    """Base of every pass. Subclasses are frozen dataclasses whose fields configure them."""

    must_follow: ClassVar[tuple[str, ...]] = ()
    """Names of passes that must have run on the graph before this one."""

    @property
    def name(self) -> str:
        """The class name: what reports call the pass."""
        return type(self).__name__

    def requires(self, gm: GraphModule) -> None:
        """Raise `PreconditionError` when the graph lacks what the pass needs."""
        done = {record["pass"] for record in graph_info(gm).passes}
        if missing := [name for name in self.must_follow if name not in done]:
            raise PreconditionError(
                f"{self.name} must follow {', '.join(missing)}; passes run so far: "
                f"{', '.join(sorted(done)) or 'none'}"
            )

    @abstractmethod
    def apply(self, gm: GraphModule) -> Iterator[Change | Skip]:
        """Rewrite `gm` in place, yielding what was changed and what was skipped."""

    def ensures(self, gm: GraphModule) -> None:
        """Raise `PostconditionError` when the rewritten graph breaks the pass's promise."""

    @plain_conditions()
    def __call__(self, gm: GraphModule) -> PassResult:
        """Run the pass on `gm`, in place, and record what it did in the graph's `GraphInfo`."""
        self.requires(gm)
        outcomes = list(self.apply(gm))
        changes = tuple(o for o in outcomes if isinstance(o, Change))
        skips = tuple(o for o in outcomes if isinstance(o, Skip))
        if changes:
            clean_up(gm)
            _require_named_nodes(gm, self.name)
        self.ensures(gm)
        graph_info(gm).passes.append(
            {
                "pass": self.name,
                "changes": [[c.node, c.what] for c in changes],
                "skips": [[s.node, s.reason] for s in skips],
            }
        )
        return PassResult(gm, changes, skips)


@dataclass(frozen=True)
class PassManager:
    """An ordered tuple of passes run one after another; a failure names the passes already run."""

    steps: tuple[Pass, ...]

    def __call__(self, gm: GraphModule) -> tuple[PassResult, ...]:
        """Run every step on `gm`, in place."""
        results: list[PassResult] = []
        for step in self.steps:
            try:
                results.append(step(gm))
            except PassError as error:
                done = ", ".join(s.name for s in self.steps[: len(results)]) or "none"
                raise type(error)(f"{step.name}: {error} (passes already run: {done})") from error
        return tuple(results)


def _require_named_nodes(gm: GraphModule, name: str) -> None:
    """Raise `PostconditionError` where the records name a node that a pass has taken away."""
    info, nodes = graph_info(gm), {node.name for node in gm.graph.nodes}
    named = [(f"block {b.name}", node) for b in info.blocks for node in (b.input, b.output)]
    named += [] if info.end_of_text is None else [("end_of_text", info.end_of_text)]
    for what, node in named:
        if node not in nodes:
            raise PostconditionError(
                f"{name}: GraphInfo names the node {node!r} ({what}), which the pass has taken "
                "out of the graph; rewrite that node in place, or tell Correspondence.replaced what "
                "stands for it"
            )


def clean_up(gm: GraphModule) -> None:
    """Remove dead nodes and the modules, parameters and buffers nothing reads; check and recompile."""
    remove_dead_code(gm)
    gm.graph.lint()
    recompile(gm)
