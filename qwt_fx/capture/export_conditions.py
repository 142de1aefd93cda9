"""What holds while `torch.export` runs a model: evaluation mode, no gradients, no autocast."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import nn
from torchvision.transforms import _functional_tensor
from torchvision.transforms.v2.functional import normalize_image

from qwt_fx.graph.conditions import plain_conditions


@contextmanager
def export_conditions(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it can be exported; its modes are as before when the context ends.

    No fused attention kernel, which would hide the block's structure. torchvision's first `Normalize`
    asks of a tensor whether a standard deviation is 0, which export cannot follow; its second computes
    the same and asks the numbers. A model made in inference mode is copied: its parameters may not be
    used with gradients, so no graph may share them.
    """
    with ExitStack() as stack:
        stack.enter_context(plain_conditions())
        stack.enter_context(torch.no_grad())
        stack.enter_context(patch.object(_functional_tensor, "normalize", normalize_image))
        if any(t.is_inference() for t in (*model.parameters(), *model.buffers())):
            model = copy.deepcopy(model)
        modes = [(module, module.training) for module in model.modules()]
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        try:
            yield model
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, training in modes:
                module.training = training
