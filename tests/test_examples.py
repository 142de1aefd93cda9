from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_timm_example_runs_as_it_is(tmp_path: Path) -> None:
    words = [sys.executable, str(EXAMPLES / "timm_vit.py")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size([8, 1000])")
    assert (tmp_path / "vit_tiny_w6a6" / "artifact.json").is_file()


def test_the_original_script_parses_and_names_what_it_needs() -> None:
    bare = {k: v for k, v in os.environ.items() if k not in ("CC3M", "IMAGENET")}
    words = ["bash", str(EXAMPLES / "run.sh")]
    done = subprocess.run(words, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "CC3M" in done.stderr
