"""Compiles a graph for the CPU by Inductor, its tensors frozen into it.

Freezing computes once what depends on weights alone: oneDNN's packed layouts above all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

FREEZE: dict[str, Any] = {"freezing": True}


def compile_graph(module: nn.Module) -> Callable[..., Any]:
    """The module compiled for inference; the first call with a new shape compiles.

    Later changes of the module's tensors have no effect: they are constants of the compiled code.
    """
    compiled = torch.compile(module, dynamic=False, options=FREEZE)

    def run(*inputs: Any) -> Any:
        with torch.no_grad():  # Inductor freezes only where no gradient can be asked for
            return compiled(*inputs)

    return run
