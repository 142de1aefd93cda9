"""Compiles a graph for the CPU by Inductor, its tensors frozen into it.

Freezing computes once what depends on weights alone: oneDNN's packed layouts above all, which
Inductor accepts as constants only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def compile_graph(module: nn.Module) -> Callable[..., Any]:
    """The module compiled for inference; the first call with new shapes compiles for them.

    Inputs are tensors. Later changes of the module's tensors have no effect: they are constants of
    the compiled code.
    """
    compiled = torch.compile(module, dynamic=False)
    seen: set[tuple[tuple[torch.Size, torch.dtype], ...]] = set()

    def run(*inputs: Tensor) -> Any:
        kinds = tuple((x.shape, x.dtype) for x in inputs)
        with torch.no_grad():  # Inductor freezes only where no gradient can be asked for
            if kinds in seen:
                return compiled(*inputs)
            # As an option of torch.compile it would not reach Dynamo, which must know it too.
            with torch._inductor.config.patch(freezing=True):
                result = compiled(*inputs)
        seen.add(kinds)
        return result

    return run
