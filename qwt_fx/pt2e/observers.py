"""Observers of torchao's kind with the ranges of qwt-fx; importing this module needs torchao.

Ranges are static: the extremes of all calibration batches (`low`, `high`), or, of a histogram of all
of them, the range whose quantizer has the least squared error. Scale and zero point come from
`qparams_from_range`, so that a range means what it means everywhere in qwt-fx.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwt_fx.errors import DataError, NotCalibratedError
from qwt_fx.numerics.histogram import Histogram, gather_mass
from qwt_fx.numerics.qparams import QuantSpec, qparams_from_range
from qwt_fx.numerics.range_search import search_range
from qwt_fx.quant.torch_ao import load_pt2e

_Base: Any = load_pt2e().observer.UniformQuantizationObserverBase


class RangeObserver(_Base):  # type: ignore[misc]
    """The range of a whole tensor over all batches.

    Attributes:
        spec: the quantizer that is wanted.
        layer: what is observed, for messages.
        low, high: () float32, infinite before the first batch.
        histogram: counts of every batch, `None` where the extremes are the range.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, *, spec: QuantSpec, layer: str, histogram: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.spec = spec
        self.layer = layer
        self.histogram = Histogram(1) if histogram else None
        self.register_buffer("low", torch.tensor(torch.inf))
        self.register_buffer("high", torch.tensor(-torch.inf))

    def _extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.amin(), x.amax()

    def forward(self, x: Tensor) -> Tensor:
        """Take in a batch and return it. Raises `DataError` for NaN or infinite values."""
        values = x.detach().float()
        if not bool(torch.isfinite(values).all()):
            raise DataError(f"{self.layer}: NaN or infinite values in the tensor to quantize")
        if values.numel():
            low, high = self._extremes(values)
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            if self.histogram is not None:
                self.histogram.add(values.cpu().reshape(-1, 1))
        return x

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Scale float32 and zero point int64. Raises `NotCalibratedError` before the first batch."""
        if not bool((self.low <= self.high).all()):
            raise NotCalibratedError(
                f"{self.layer} saw no data: run the prepared model on calibration batches before "
                "convert_pt2e"
            )
        if self.histogram is None:
            scale, zero_point = qparams_from_range(self.low, self.high, self.spec)
        else:
            one = torch.ones(1, dtype=torch.float64)
            limits = search_range(gather_mass(self.histogram.entries(), one), self.spec)
            scale, zero_point = limits.scale, limits.zero_point
        return scale, zero_point.to(torch.int64)


class PerChannelRangeObserver(RangeObserver):
    """The extremes of each channel of a weight, along `ch_axis`; (channels,) each.

    torchao passes `ch_axis` to classes with "PerChannel" in their name.
    """

    def __init__(self, *, ch_axis: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ch_axis = ch_axis

    def _extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.movedim(self.ch_axis, 0).flatten(1)
        return rows.amin(1), rows.amax(1)
