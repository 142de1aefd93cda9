"""qwt-fx: CLIP and other vision transformers from FP32 to 8/6/4-bit integers, without training.

RepQ-ViT (arXiv 2212.08254) and QwT (arXiv 2411.13918) as passes over `torch.fx` graphs.
"""

from __future__ import annotations

from qwt_fx import clip
from qwt_fx.api import (
    calibrate,
    capture,
    compensations,
    convert,
    export,
    kernel_audit,
    load,
    lower,
    observe,
    prepare,
    qparams,
    quantize,
    reparameterize,
    report,
    save,
)
from qwt_fx.config.config import QuantConfig
from qwt_fx.errors import NotCalibratedError, QwtError
from qwt_fx.version import __version__

__all__ = [
    "NotCalibratedError",
    "QuantConfig",
    "QwtError",
    "__version__",
    "calibrate",
    "capture",
    "clip",
    "compensations",
    "convert",
    "export",
    "kernel_audit",
    "load",
    "lower",
    "observe",
    "prepare",
    "qparams",
    "quantize",
    "reparameterize",
    "report",
    "save",
]
