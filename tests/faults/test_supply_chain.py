"""What the package depends on and what it never does."""

from __future__ import annotations

import ast
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [p for part in ("qwt_fx", "passes", "backends") for p in (ROOT / part).rglob("*.py")]

# Only checkpoint_files.py and torchscript.py of the room clip read pickles of others: state dicts under
# torch's weights_only, and TorchScript's under a closed list of names (its tests attack both).
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
}
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}
FORBIDDEN_LOADS = {"torch.load", "torch.export.load", "yaml.load"}


def unsafe(tree: ast.AST) -> list[str]:
    """Calls and imports through which data could become code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] if node.module.split(".")[0] in FORBIDDEN_MODULES else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] if node.func.id in FORBIDDEN_CALLS else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = ast.unparse(node.func)
            found += [name] if name in FORBIDDEN_LOADS or name.endswith(".jit.load") else []
    return found


def test_no_pickle_anywhere() -> None:
    assert len(SOURCES) > 60
    where = {p.name: found for p in SOURCES if (found := unsafe(ast.parse(p.read_text("utf-8"))))}
    assert sorted(where.pop("checkpoint_files.py")) == ["pickle", "torch.jit.load", "torch.load"]
    assert where.pop("torchscript.py") == ["pickle"]
    # `export --verify` runs the file that the same command has just written.
    assert where.pop("exports.py") == ["torch.export.load"]
    assert where == {}


def test_the_scan_finds_what_it_looks_for() -> None:
    code = "import pickle\nfrom dill import x\neval('1')\ntorch.load(f)\na.jit.load(f)\n"
    assert len(unsafe(ast.parse(code))) == 5


def test_torch_load_reads_weights_only() -> None:
    tree = ast.parse((ROOT / "qwt_fx" / "clip" / "checkpoint_files.py").read_text("utf-8"))
    calls = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"
    ]
    assert len(calls) == 1
    for call in calls:
        assert {k.arg: ast.unparse(k.value) for k in call.keywords}["weights_only"] == "True"


@pytest.mark.slow
def test_an_artifact_holds_json_and_safetensors_only(clip_artifact: Path) -> None:
    for path in clip_artifact.iterdir():
        data = path.read_bytes()
        assert path.suffix in (".json", ".safetensors")
        if path.suffix == ".json":
            json.loads(data)
        else:
            header = int.from_bytes(data[:8], "little")
            assert isinstance(json.loads(data[8 : 8 + header]), dict)


def requirements() -> list[str]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = parser["options"]["install_requires"].splitlines()
    return [re.split(r"[<>=\[ ]", line)[0] for line in lines if line and not line.startswith("#")]


def test_every_dependency_is_justified() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    names = requirements()
    assert 0 < len(names) < 12
    for name in names:
        assert f"| `{name}` |" in text, name


@pytest.mark.slow
def test_pip_check_is_clean() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
