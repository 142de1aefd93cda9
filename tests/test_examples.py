from __future__ import annotations

import os
import runpy
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "printed", "artifact"),
    [
        ("timm_deit.py", "torch.Size([8, 1000]) 50 layers quantized", "deit_tiny_w6a6"),
        ("hf_clip.py", "BaseModelOutputWithPooling 25 layers quantized", "hf_clip_w6a6"),
    ],
)
def test_example_runs_as_it_is(
    name: str,
    printed: str,
    artifact: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[0] == printed
    assert (tmp_path / artifact / "artifact.json").is_file()


def test_the_original_script_parses_and_names_what_it_needs() -> None:
    bare = {k: v for k, v in os.environ.items() if k not in ("CC3M", "IMAGENET")}
    words = ["bash", str(EXAMPLES / "run.sh")]
    done = subprocess.run(words, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "CC3M" in done.stderr
