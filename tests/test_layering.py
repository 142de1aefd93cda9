"""The architecture of docs/design.md, read from the source: who may import whom.

Rooms stand on floors, and a room imports only from lower ones. Each rule is shown to bite on sources
that break it.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"qwt_fx": "qwt_fx", "passes": "qwt_fx.passes", "backends": "qwt_fx.backends"}
# Rooms are folders; the modules directly in `qwt_fx/` stand on floors of their own.
FLOORS = (
    ("errors", "version"),
    ("config", "batches", "demo"),
    ("numerics", "graph", "data"),
    ("text",),
    ("capture", "quant"),
    ("artifact", "measure", "pt2e"),
    ("checkpoint", "clip", "backends"),
    ("calibrate", "evaluate"),
    ("inspect", "passes"),
    ("steps",),
    ("api",),
    ("commands",),
    ("cli",),
    ("__init__", "__main__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Rooms whose package itself gives names to users; the others' only says what it is for.
DOORS = ("qwt_fx", "qwt_fx.passes", "qwt_fx.backends", "qwt_fx.clip", "qwt_fx.pt2e")
FX_FREE = ("qwt_fx.errors", "qwt_fx.config", "qwt_fx.numerics")
TORCH_AO = "qwt_fx.quant.torch_ao"
PROGRAM = ("qwt_fx.cli", "qwt_fx.__main__", "qwt_fx.commands")
MOST_AT_THE_ROOT, MOST_IN_A_ROOM, MOST_LINES = 10, 16, 300


def module_name(path: str) -> str:
    """`passes/fold.py` -> `qwt_fx.passes.fold`; a package's `__init__.py` -> the package."""
    folder, _, rest = path.removesuffix(".py").partition("/")
    return ".".join((FOLDERS[folder], *rest.split("/"))).removesuffix(".__init__")


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def room(module: str) -> str:
    """The room of a module, or the module itself where it stands directly in `qwt_fx/`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(tree: ast.AST) -> Iterator[tuple[int, str, str | None]]:
    """(line, module, name): `import module` has no name; a relative import starts with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, module, alias.name) for alias in node.names)


def defined(tree: ast.Module) -> set[str]:
    """Names that a module defines itself."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def mentions_torch_ao(tree: ast.Module) -> Iterator[int]:
    """Lines whose code, not prose, names torch.ao or torchao."""
    prose = {  # docstrings and messages may speak of them
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found = ast.unparse(node) == "torch.ao"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            module = re.fullmatch(r"(torch\.ao|torchao)(\.\w+)*", node.value)
            found = module is not None and id(node) not in prose
        else:
            continue
        if found:
            yield node.lineno
    for line, module, name in imports(tree):
        if within(module, "torch.ao", "torchao") or (module, name) == ("torch", "ao"):
            yield line


def edges_of(trees: Mapping[str, ast.Module]) -> Iterator[tuple[str, int, str, str | None]]:
    """(module, line, imported module of ours, name), `qwt_fx.clip` for a name that package defines."""
    for module, tree in trees.items():
        for line, target, name in imports(tree):
            full = f"{target}.{name}"
            if within(target, "qwt_fx"):
                yield (
                    module,
                    line,
                    full if full in trees else target,
                    None if full in trees else name,
                )


def circles(edges: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other, directly or not; a package counts with what it exports."""
    return sorted(
        f"{module} and {target} import each other"
        for module, targets in edges.items()
        for target in targets
        if module < target and module in reachable(target, edges)
    )


def violations(texts: Mapping[str, str]) -> list[str]:
    """Every broken rule in the sources (path -> text), as `path:line: what`."""
    trees = {module_name(path): ast.parse(text) for path, text in texts.items()}
    paths = {module_name(path): path for path in texts}
    packages = {module for module, path in paths.items() if path.endswith("__init__.py")}
    problems: list[str] = []
    edges: dict[str, set[str]] = {module: set() for module in trees}
    for module, tree in trees.items():
        if room(module) not in FLOOR:
            problems.append(f"{paths[module]}: {room(module)} is no room of test_layering.py")
        for line, target, _ in imports(tree):
            if target.startswith("."):
                problems.append(f"{paths[module]}:{line}: relative import: name the full module")
    for module, line, target, name in edges_of(trees):
        where = f"{paths[module]}:{line}"
        if target in packages and name and name not in defined(trees[target]):
            problems.append(f"{where}: {name} is not defined in {target}: name its module")
            continue
        if target == module:
            continue
        edges[module].add(target)
        mine, theirs = room(module), room(target)
        if mine not in FLOOR or theirs not in FLOOR:
            continue
        if mine == "passes" == theirs and module != "qwt_fx.passes":
            problems.append(f"{where}: {module} imports another pass, {target}")
        elif {mine, theirs} == {"passes", "backends"}:
            problems.append(f"{where}: {module} imports {target}: passes and backends stay apart")
        elif mine != theirs and FLOOR[theirs] >= FLOOR[mine]:
            problems.append(f"{where}: {module} imports {target} from above or beside")
    for module, tree in trees.items():
        path = paths[module]
        if module in packages and module not in DOORS and len(tree.body) > 1:
            problems.append(f"{path}: a room exports nothing: name full modules")
        if module in packages and not ast.get_docstring(tree):
            problems.append(f"{path}: a room says what it is for")
        if module != TORCH_AO:
            for line in mentions_torch_ao(tree):
                problems.append(f"{path}:{line}: only qwt_fx/quant/torch_ao.py may name torch.ao")
        if not within(module, *PROGRAM):
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                    problems.append(f"{path}:{node.lineno}: print outside the program")
        if (length := len(texts[path].splitlines())) > MOST_LINES:
            problems.append(f"{path}: {length} lines, wanted at most {MOST_LINES}")
    for module in trees:
        if within(module, *FX_FREE):
            for reached in reachable(module, edges):
                for line, target, name in imports(trees[reached]):
                    if within(target, "torch.fx") or (target, name) == ("torch", "fx"):
                        problems.append(f"{paths[reached]}:{line}: {module} must not import fx")
    folders = Counter(path.rpartition("/")[0] for path in texts)
    for folder, count in folders.items():
        most = MOST_AT_THE_ROOT if folder == "qwt_fx" else MOST_IN_A_ROOM
        if count > most:
            problems.append(f"{folder}: {count} files, wanted at most {most}")
    return sorted({*problems, *circles(edges)})


def reachable(module: str, edges: Mapping[str, set[str]]) -> set[str]:
    """`module` and the modules it imports, directly or not."""
    seen, todo = set[str](), [module]
    while todo:
        if (current := todo.pop()) not in seen:
            seen.add(current)
            todo.extend(edges.get(current, ()))
    return seen


def sources() -> dict[str, str]:
    """Path -> text of every module of the package."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not path.is_symlink() and not any(p.is_symlink() for p in path.parents)
    }


def test_the_tree_keeps_every_rule() -> None:
    assert {"qwt_fx/errors.py", "passes/__init__.py"} < sources().keys()
    assert violations(sources()) == []


SOUND = {
    "qwt_fx/__init__.py": "'door'\nfrom qwt_fx.api import prepare\nfrom qwt_fx import clip",
    "qwt_fx/__main__.py": "from qwt_fx.cli import main",
    "qwt_fx/api.py": "from qwt_fx.passes.fold import Fold\nfrom qwt_fx.backends import backend_for",
    "qwt_fx/cli.py": "from qwt_fx.commands import run\nprint(1)",
    "qwt_fx/commands/__init__.py": "'room'",
    "qwt_fx/commands/run.py": "from qwt_fx import api\nfrom qwt_fx.clip.load import load\nprint(2)",
    "qwt_fx/clip/__init__.py": "'door'\nfrom qwt_fx.clip.load import load",
    "qwt_fx/clip/load.py": "from qwt_fx.graph import nodes\ndef load(): ...",
    "qwt_fx/config/__init__.py": "'room'",
    "qwt_fx/config/config.py": "import torch\nfrom qwt_fx.errors import QwtError",
    "qwt_fx/errors.py": '"""The torch.ao twin: torchao."""\nhelp = "pip install torchao"',
    "qwt_fx/graph/__init__.py": "'room'",
    "qwt_fx/graph/edits.py": "from qwt_fx.graph.nodes import find",
    "qwt_fx/graph/nodes.py": "import torch.fx\ndef find(): ...",
    "qwt_fx/numerics/__init__.py": "'room'",
    "qwt_fx/numerics/qparams.py": "from qwt_fx.config.config import Config",
    "qwt_fx/quant/__init__.py": "'room'",
    "qwt_fx/quant/torch_ao.py": "import torch.ao\nPROVIDER = 'torchao.quantization'",
    "passes/__init__.py": "'door'\nfrom qwt_fx.passes.fold import Fold",
    "passes/fold.py": "from torch import fx\nfrom qwt_fx.clip.load import load",
    "passes/other.py": "",
    "backends/__init__.py": "'door'\nfrom qwt_fx.backends.base import Base\ndef backend_for(name): ...",
    "backends/base.py": "from qwt_fx.graph.nodes import find",
}


def test_sound_sources_pass() -> None:
    assert violations(SOUND) == []


ABOVE = "from above or beside"


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("qwt_fx/config/config.py", "import torch.fx", "qwt_fx.config.config must not import fx"),
        ("qwt_fx/errors.py", "from torch import fx", "qwt_fx.config.config must not import fx"),
        ("qwt_fx/numerics/qparams.py", "def f():\n    from torch.fx import Node", "not import fx"),
        ("qwt_fx/numerics/qparams.py", "import qwt_fx.graph.nodes", "qparams must not import fx"),
        ("qwt_fx/numerics/qparams.py", "import qwt_fx.graph.nodes", ABOVE),
        ("qwt_fx/graph/nodes.py", "from qwt_fx.clip.load import load", ABOVE),
        ("qwt_fx/graph/nodes.py", "def f():\n    from qwt_fx.quant import torch_ao", ABOVE),
        ("qwt_fx/clip/load.py", "import qwt_fx.backends.base", ABOVE),
        ("qwt_fx/clip/load.py", "import qwt_fx.passes.fold", ABOVE),
        ("qwt_fx/clip/load.py", "from qwt_fx import api", ABOVE),
        ("qwt_fx/clip/load.py", "import qwt_fx", ABOVE),
        (
            "qwt_fx/graph/nodes.py",
            "import qwt_fx.graph.edits",
            "edits and qwt_fx.graph.nodes import",
        ),
        ("passes/fold.py", "import qwt_fx.passes.other", "fold imports another pass"),
        ("passes/fold.py", "from qwt_fx.passes import other", "fold imports another pass"),
        ("passes/fold.py", "from qwt_fx.backends.base import Base", "stay apart"),
        ("passes/fold.py", "from qwt_fx.api import prepare", ABOVE),
        ("passes/__init__.py", "'door'\nimport qwt_fx.api", ABOVE),
        ("backends/base.py", "import qwt_fx.passes.fold", "stay apart"),
        ("backends/base.py", "import qwt_fx.cli", ABOVE),
        ("qwt_fx/api.py", "import qwt_fx.commands.run", ABOVE),
        ("qwt_fx/clip/load.py", "from .errors import QwtError", "relative import"),
        ("qwt_fx/api.py", "from qwt_fx.passes import Fold", "Fold is not defined in qwt_fx.passes"),
        ("qwt_fx/cli.py", "from qwt_fx import prepare", "prepare is not defined in qwt_fx"),
        (
            "qwt_fx/graph/__init__.py",
            "'room'\nfrom qwt_fx.graph.nodes import find",
            "exports nothing",
        ),
        ("qwt_fx/graph/__init__.py", "", "a room says what it is for"),
        ("qwt_fx/attic/box.py", "", "attic is no room"),
        ("qwt_fx/utils.py", "", "utils is no room"),
        ("qwt_fx/graph/nodes.py", "x = 1\n" * 301, "301 lines, wanted at most 300"),
        ("qwt_fx/clip/load.py", "from torch import ao", "torch_ao.py may name torch.ao"),
        ("passes/fold.py", "import torch\ntorch.ao.nn", "torch_ao.py may name torch.ao"),
        ("passes/fold.py", "load('torchao.x')", "torch_ao.py may name torch.ao"),
        ("backends/base.py", "import torchao", "torch_ao.py may name torch.ao"),
        ("qwt_fx/clip/load.py", "def f():\n    print('x')", "load.py:2: print outside the program"),
    ],
)
def test_each_rule_bites(path: str, source: str, problem: str) -> None:
    assert any(problem in line for line in violations(SOUND | {path: source}))


@pytest.mark.parametrize(("folder", "most"), [("qwt_fx", 10), ("qwt_fx/graph", 16), ("passes", 16)])
def test_a_full_room_is_a_problem(folder: str, most: int) -> None:
    extra = {f"{folder}/more_{number}.py": "" for number in range(most)}
    assert any(f"wanted at most {most}" in line for line in violations(SOUND | extra))


# A path of somebody's machine; /tmp/ is fine in tests. Written so as not to find itself.
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(home|root|work|Users)/\w")
TEMPORARY = re.compile(r"(?<![\w.~/-])/tmp/\w")


def machine_paths(name: str, text: str) -> list[str]:
    patterns = [MACHINE_PATH] if name.startswith("tests/") else [MACHINE_PATH, TEMPORARY]
    return [
        f"{name}:{number}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), start=1)
        if any(pattern.search(line) for pattern in patterns)
    ]


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: list[str] = []
    for name in sorted(set(listed.stdout.splitlines())):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # binary, or deleted but not committed
            continue
        found += machine_paths(name, text)
    assert found == []


@pytest.mark.parametrize("folder", ["home", "root", "work", "tmp"])
def test_machine_paths_are_found(folder: str) -> None:
    line = f"open('/{folder}/me/model.pt')"
    assert machine_paths("qwt_fx/clip.py", line) == [f"qwt_fx/clip.py:1: {line}"]
    assert bool(machine_paths("tests/test_clip.py", line)) == (folder != "tmp")
    assert machine_paths("README.md", f"https://example.org/{folder}/page and a/{folder}/b") == []
