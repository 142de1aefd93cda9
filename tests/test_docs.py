"""The documentation: links lead somewhere, every public name is in the reference, code runs."""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import check_links
import make_figures
import pytest
import torch
from check_links import ROOT, anchors, broken_html, broken_markdown
from doc_blocks import BLOCKS, PAGES, Block, blocks_of
from doc_standins import STAND_INS
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

import qwt_fx
import qwt_fx.passes
from qwt_fx.artifact.graph_json import why_not_storable
from qwt_fx.cli import build_parser
from qwt_fx.graph.graph_info import graph_info, has_graph_info
from qwt_fx.graph.input_check import ANY, FLOATING, INTEGER

PYTHON = [b for b in BLOCKS if b.language == "python"]
SHELL = [b for b in BLOCKS if b.is_shell]
REFERENCE = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs/reference").glob("*.md"))


def test_every_link_leads_somewhere() -> None:
    assert broken_markdown(PAGES) == []


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("[a](missing.md)", "no such file"),
        ("[a](other.md#nothing)", "no such heading"),
        ("[a](#nothing)", "no such heading"),
        ("![a](figure.svg)", "no such file"),
        ("[a `b` c](missing.md)", "no such file"),
        ("[a](../outside.md)", "leads out of the repository"),
        ("[a](https:///x)", "names no host"),
        ("[a](javascript:x)", "has the scheme javascript"),
        ("[a](other.md#two-words-1)", None),
        ("[a](#a-heading)", None),
        ("`[a](missing.md)`", None),
        ("```\n[a](missing.md)\n```", None),
    ],
)
def test_each_kind_of_broken_link_is_found(link: str, problem: str | None, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A heading\n\n{link}\n", encoding="utf-8")
    (tmp_path / "other.md").write_text("# Two `words`\n## Two words\n", encoding="utf-8")
    found = broken_markdown([page], tmp_path)
    assert [problem in f for f in found if problem] == ([True] if problem else [])
    assert bool(found) == (problem is not None)


def test_anchors_are_those_of_github() -> None:
    text = "# Zero-shot: `--imagenet-val DIR`\n## [Link](x.md), R² & more\n## Again\n## Again\n"
    assert anchors(text) == {
        "zero-shot---imagenet-val-dir", "link-r²--more", "again", "again-1"
    }  # fmt: skip


def test_built_pages_are_checked_for_links_and_for_what_they_load(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<p id="x"><a href="b.html#y">b</a><a href="#x">x</a>')
    (tmp_path / "b.html").write_text(
        '<script src="https://cdn.example.org/m.js"></script><img src="gone.svg">'
        '<link rel="stylesheet" href="a.html?v=1"><a href="c.html">c</a><a href="https://x.org">x</a>'
    )
    assert sorted(broken_html(tmp_path)) == [
        "a.html: b.html#y: no such anchor",
        "b.html: c.html: no such file",
        "b.html: gone.svg: no such file",
        "b.html: loads https://cdn.example.org/m.js from elsewhere",
    ]
    assert check_links.main([str(tmp_path)]) == 1


def test_every_public_name_is_in_the_reference() -> None:
    names = {f"qwt_fx.{n}" for n in qwt_fx.__all__} - {"qwt_fx.__version__", "qwt_fx.clip"}
    names |= {f"qwt_fx.passes.{n}" for n in qwt_fx.passes.__all__}
    names |= {"qwt_fx.clip.load", "qwt_fx.clip.ClipModel", "qwt_fx.pt2e.QwTQuantizer"}
    documented = set(re.findall(r"^\.\. auto\w+:: (\S+)$", REFERENCE, re.MULTILINE))
    errors = {f"qwt_fx.{n}" for n in qwt_fx.__all__ if n.endswith("Error")}
    assert "qwt_fx.errors" in documented  # automodule, with every member
    assert names - errors - documented == set()


def test_the_design_names_files_that_exist() -> None:
    """Folders of `qwt_fx/` stand there without it, `passes/` and `backends/` as they lie."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_0-9]+(?:/[a-z_0-9]+)*\.py)`", text))
    rows = re.findall(r"^\| `(\w+/)` \|.*\| `([\w/]+\.py)` \|$", text, re.MULTILINE)
    named = named - {file for _, file in rows} | {room + file for room, file in rows}
    named -= {"passes/verb_object.py"}  # the pass that a reader may write
    places = [ROOT, ROOT / "qwt_fx"]
    assert len(named) > 40
    assert [n for n in sorted(named) if not any((p / n).exists() for p in places)] == []


def test_figures_are_what_the_script_draws() -> None:
    drawn = {name: draw().svg() for name, draw in make_figures.FIGURES.items()}
    kept = {p.name: p.read_text(encoding="utf-8") for p in make_figures.FOLDER.iterdir()}
    assert kept.keys() == drawn.keys()
    numbers = re.compile(r"-?\d+\.\d")
    for name, text in drawn.items():
        assert numbers.sub("", kept[name]) == numbers.sub("", text), f"{name}: run make_figures.py"
        pairs = zip(numbers.findall(kept[name]), numbers.findall(text), strict=True)
        assert all(abs(float(a) - float(b)) < 0.21 for a, b in pairs), (
            f"{name}: run make_figures.py"
        )
        assert len(text) < 20_000


def test_every_marker_is_known_and_every_block_has_a_known_language() -> None:
    known = {"python", "sh", "cpp", "text", "bibtex", "toml", "json", ""}
    for block in BLOCKS:
        assert block.language in known or block.language.startswith("{"), block.where
        assert set(block.names("stand-in")) <= STAND_INS.keys(), block.where
        assert block.markers.get("not run") != "", f"{block.where}: give the reason"


def test_markers_belong_to_the_block_below(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- slow -->\n\n<!-- stand-in: a, b -->\n```python\n1\n```\n<!-- slow -->\ntext\n"
        "```sh\nx \\\n  'y z'  # c\n# d\n```\n",
        encoding="utf-8",
    )
    first, second = blocks_of(page)
    assert first.markers == {"slow": "", "stand-in": "a, b"}
    assert first.names("stand-in") == ["a", "b"]
    assert (first.line, first.language, first.text) == (5, "python", "1\n")
    assert second.markers == {}
    assert list(second.commands()) == [["x", "y z"]]


def _problem(words: list[str]) -> str | None:
    """What is wrong with a command; `None` when nothing is."""
    program, *rest = words
    if program == "qwt-fx":
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                build_parser().parse_args(rest)
        except SystemExit as stop:
            return None if stop.code == 0 else said.getvalue().splitlines()[-1]
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return None if rest[0] in targets else f"no target {rest[0]}"
    elif program == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        asked = [e for word in rest for e in re.findall(r"qwt-fx\[(.*)\]", word)]
        unknown = {e for group in asked for e in group.split(",")} - set(
            setup["options.extras_require"]
        )
        return f"no extra {unknown}" if unknown else None
    elif program == "python":
        return None if (ROOT / rest[0]).is_file() else f"no script {rest[0]}"
    else:
        return f"unknown program {program}"
    return None


def test_every_command_is_one_that_the_program_takes() -> None:
    checked = [(b, words) for b in SHELL if "not run" not in b.markers for words in b.commands()]
    assert len(checked) > 30
    assert [(b.where, p) for b, words in checked if (p := _problem(words))] == []


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("qwt-fx quantize --no-such-flag", "unrecognized arguments: --no-such-flag"),
        ("qwt-fx export --artifact a --format tflite --output b", "invalid choice: 'tflite'"),
        ("make nonsense", "no target nonsense"),
        ("pip install qwt-fx[nonsense]", "no extra"),
        ("python benchmarks/nonsense.py", "no script"),
        ("rm -r x", "unknown program rm"),
    ],
)
def test_wrong_commands_are_found(command: str, problem: str) -> None:
    assert problem in (_problem(command.split()) or "")


def test_every_python_block_compiles() -> None:
    assert len(PYTHON) > 12
    for block in PYTHON:
        compile(block.text, block.where, "exec")


def _pages(slow: bool) -> list[object]:
    pages = {}
    for block in PYTHON:
        pages.setdefault(block.page, []).append(block)
    return [
        pytest.param(blocks, id=str(page.relative_to(ROOT)))
        for page, blocks in pages.items()
        if any("slow" in b.markers for b in blocks) == slow
    ]


def _run_page(blocks: list[Block], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    space: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        if "not run" in block.markers:
            continue
        for module in block.names("needs"):
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{block.where} needs {module}")
        for name in block.names("stand-in"):
            STAND_INS[name](space, monkeypatch)
        code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
        before = list(space.values())
        exec(code, space)
        for name, graph in list(space.items()):
            if _is_converted(graph) and not any(graph is old for old in before):
                _assert_stored_and_exported(graph, Path(f"stored-{block.line}-{name}"))


def _is_converted(value: object) -> bool:
    return (
        isinstance(value, GraphModule)
        and has_graph_info(value)
        and bool(graph_info(value).config)
        and why_not_storable(value) is None  # the lowered ones have kernels of one backend
        and not any(node.op == "call_module" for node in value.graph.nodes)
    )


# What the graph casts before all else.
CAST = {FLOATING: torch.float32, INTEGER: torch.int64, ANY: torch.int64}


def _assert_stored_and_exported(graph: GraphModule, path: Path) -> None:
    """What a page quantizes can be saved, loaded and exported."""
    given = []
    for wanted in graph_info(graph).inputs:
        shape = [2 if position == 0 else size if isinstance(size, int) else size[2]
                 for position, size in enumerate(wanted.sizes)]  # fmt: skip
        dtype = CAST.get(str(wanted.dtype)) or getattr(torch, str(wanted.dtype))
        given.append(
            torch.rand(shape) if dtype.is_floating_point else torch.ones(*shape, dtype=dtype)
        )
    qwt_fx.save(graph, path)
    with torch.no_grad():
        outputs = [tree_leaves(g(*given)) for g in (graph, qwt_fx.load(path))]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    qwt_fx.export(graph, path.with_suffix(".pt2"), tuple(given), format="pt2")


@pytest.mark.parametrize("blocks", _pages(slow=False))
def test_python_of_each_page_runs(
    blocks: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run_page(blocks, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", _pages(slow=True))
def test_python_of_each_long_page_runs(
    blocks: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run_page(blocks, tmp_path, monkeypatch)


@pytest.mark.slow
def test_commands_marked_so_run_on_the_demo(tmp_path: Path) -> None:
    blocks = [b for b in SHELL if "run on the demo" in b.markers]
    assert blocks
    for block in blocks:
        for words in block.commands():
            assert words[0] == "qwt-fx"
            # Processes of their own, as users run them.
            command = [sys.executable, "-m", "qwt_fx", *words[1:]]
            done = subprocess.run(
                command, cwd=tmp_path, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{block.where}: {words}: {done.stderr}"
    assert (tmp_path / "demo-onnx" / "image.onnx").is_file()


def test_the_cpp_page_shows_the_example() -> None:
    shown = [b.text for b in BLOCKS if b.language == "cpp" and "not run" not in b.markers]
    assert shown == [(ROOT / "examples/aoti_cpp/main.cpp").read_text(encoding="utf-8")]


@pytest.mark.slow
def test_the_cpp_example_compiles(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here")
    from torch.utils.cpp_extension import include_paths

    command = ["g++", "-std=c++20", "-fsyntax-only", str(ROOT / "examples/aoti_cpp/main.cpp")]
    command += [part for path in include_paths() for part in ("-isystem", path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
