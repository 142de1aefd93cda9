"""Export formats by name: what each writes, and what runs the file again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from qwt_fx.backends.exported_program import save_aoti, save_pt2
from qwt_fx.backends.onnx.layout import WeightStorage
from qwt_fx.backends.onnx.onnx import export_onnx
from qwt_fx.backends.onnx.onnx_runtime import check_opens, onnx_runtime_session
from qwt_fx.errors import ConfigError, OutputError, PreconditionError, first_line
from qwt_fx.quant import torch_ao

SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx", "aoti": ".pt2"}
PACKS = ("auto", "int8", "int4")


def check_format(format: str, pack: str = "auto") -> None:
    """Raise `ConfigError` for an unknown format or pack, or a pack without ONNX."""
    if format not in SUFFIXES:
        raise ConfigError(f"format: got {format!r}, wanted one of {', '.join(SUFFIXES)}")
    if pack not in PACKS:
        raise ConfigError(f"pack: got {pack!r}, wanted one of {', '.join(PACKS)}")
    if pack != "auto" and format != "onnx":
        raise ConfigError(f"pack={pack!r} is for the format onnx, not {format}")


def export_graph(
    quantized: GraphModule,
    path: Path,
    example_inputs: tuple[Tensor, ...],
    *,
    format: str,
    pack: str = "auto",
    input_names: tuple[str, ...] | None = None,
    output_names: tuple[str, ...] | None = None,
) -> None:
    """Write a converted graph in a format, whole or not at all; see `qwt_fx.export`.

    The file is opened once by what checks its format before it gets its name. `PreconditionError` where
    that fails; nothing is left then.
    """
    check_format(format, pack)
    if path.suffix != SUFFIXES[format]:
        raise ConfigError(f"path: got {path.name!r}, wanted a name that ends in {SUFFIXES[format]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".qwt-fx-") as folder:
            target = Path(folder) / path.name
            if format == "pt2":
                save_pt2(quantized, target, example_inputs)
            elif format == "aoti":
                save_aoti(quantized, target, example_inputs)
            else:
                export_onnx(
                    quantized, target, example_inputs, input_names=input_names,
                    output_names=output_names, storage=WeightStorage(pack == "int4", pack == "int8"),
                )  # fmt: skip
            _open_once(target, format)
            for part in sorted(Path(folder).iterdir(), key=lambda p: p.name == path.name):
                os.chmod(part, 0o644)
                os.replace(part, path.parent / part.name)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def _open_once(written: Path, format: str) -> None:
    try:
        if format == "onnx":
            check_opens(written)
        else:
            runner_of(written, format)
    except Exception as error:  # each checker raises kinds of its own
        reason = first_line(error).replace(f"{written.parent}/", "")
        others = " or ".join(other for other in SUFFIXES if other != format)
        raise PreconditionError(
            f"nothing was exported: {written.name} does not open again: {reason}; this is a fault of "
            f"the export, so take the format {others} instead"
        ) from error


def runner_of(path: Path, format: str, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """What runs an exported file of one input and one output, on the CPU.

    Raises `ConfigError` for an unknown format, `MissingExtraError` without onnxruntime for ONNX.
    """
    check_format(format)
    if format == "onnx":
        return onnx_runtime_session(path, threads=threads)
    run: Callable[[Tensor], Tensor]
    if format == "pt2":
        assert torch_ao.QUANTIZE_PER_TENSOR  # registers the operators that the file names
        run = torch.export.load(path).module()
    else:
        run = torch._inductor.aoti_load_package(str(path))

    def without_gradients(x: Tensor) -> Tensor:
        with torch.no_grad():
            features: Tensor = run(x)
            return features

    return without_gradients
