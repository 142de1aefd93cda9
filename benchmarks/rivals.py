"""What other toolkits make of the same floating-point model: the sides a latency benchmark compares."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]
Run = Callable[..., Any]


def export_floating(module: nn.Module, inputs: Inputs, path: Path) -> None:
    """The FP32 model in ONNX, batch dynamic; its inputs are called x0, x1, ..."""
    dim = torch.export.Dim("n")
    torch.onnx.export(
        module, inputs, str(path), input_names=list(_feed(inputs)), dynamo=True, external_data=False,
        dynamic_shapes=({0: dim},) * len(inputs),
    )  # fmt: skip


def _feed(inputs: Inputs) -> dict[str, Any]:
    return {f"x{at}": x.numpy() for at, x in enumerate(inputs)}


def onnxruntime_static(
    floating: Path, batches: Iterable[Inputs], threads: int, *, exact: bool
) -> Run:
    """ONNX Runtime's own static quantization: QDQ, per channel, linears and convolutions.

    exact: compute from uint8 x uint8, as our export does by default. Otherwise pairs of products may
    overflow on CPUs without VNNI, which is faster and wrong; with VNNI both are exact.
    """
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else _feed(batch)

    quantized = floating.with_name(f"{floating.stem}-int8.onnx")
    if not quantized.exists():
        quantize_static(
            str(floating), str(quantized), Reader(), quant_format=QuantFormat.QDQ,
            per_channel=True, op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(quantized), options, ["CPUExecutionProvider"])
    return lambda *inputs: torch.from_numpy(session.run(None, _feed(inputs))[0])


def openvino_nncf(floating: Path, batches: Iterable[Inputs], threads: int) -> dict[str, Run]:
    """NNCF's own `quantize` for transformers, in OpenVINO: its floats in float32 and as it comes."""
    import nncf
    import openvino

    model = nncf.quantize(
        openvino.Core().read_model(str(floating)),
        nncf.Dataset([_feed(batch) for batch in batches]),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    options = {"INFERENCE_NUM_THREADS": threads}

    def run(**more: str) -> Run:
        compiled = openvino.Core().compile_model(model, "CPU", options | more)
        return lambda *inputs: torch.from_numpy(compiled(_feed(inputs))[0])

    return {
        "openvino nncf": run(INFERENCE_PRECISION_HINT="f32"),
        "openvino nncf, as it comes": run(),
    }
