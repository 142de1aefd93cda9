"""The conditions that graphs are made and measured in, whatever the caller has switched on.

Under the caller's autocast a graph would record other dtypes than it computes in; a tensor made in
inference mode can neither be saved as a parameter nor take part in a call with gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


@contextmanager
def plain_conditions() -> Iterator[None]:
    """Autocast and inference mode off; gradients stay on or off as they were. A decorator, too."""
    with ExitStack() as stack:
        for device in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())  # leaving inference mode switches gradients on
        yield
