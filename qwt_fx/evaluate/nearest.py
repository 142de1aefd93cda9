"""Agreement without labels: whether each image keeps the caption nearest to it."""

from __future__ import annotations

import torch
from torch import Tensor

from qwt_fx.evaluate.metrics import agreement, normalized


def first_of_each(ids: Tensor) -> Tensor:
    """Indices of the first row of each different text. ids (n, context) int64 -> (m,) int64."""
    _, inverse = torch.unique(ids, dim=0, return_inverse=True)
    order = torch.argsort(inverse, stable=True)
    fresh = torch.ones(len(order), dtype=torch.bool, device=ids.device)
    fresh[1:] = inverse[order][1:] != inverse[order][:-1]
    return order[fresh].sort().values


class NearestCaption:
    """Judges embeddings by the floating-point model's nearest captions.

    images (n, e), texts (n, e) float32, the floating-point embeddings of n pairs; ids (n, context)
    their token ids: of equal captions the first counts.
    """

    def __init__(self, images: Tensor, texts: Tensor, ids: Tensor) -> None:
        self._kept = first_of_each(ids)
        self._images, self._texts = images, texts
        self._exact = self._nearest(images, texts)

    def _nearest(self, images: Tensor, texts: Tensor) -> Tensor:
        gallery = normalized(texts.float())[self._kept]
        return (normalized(images.float()) @ gallery.T).argmax(dim=1)

    def of_images(self, images: Tensor) -> float:
        """Share of the images that keep their caption, the captions' embeddings being exact."""
        return agreement(self._exact, self._nearest(images, self._texts))

    def of_texts(self, texts: Tensor) -> float:
        """Share of the images that keep their caption, their own embeddings being exact."""
        return agreement(self._exact, self._nearest(self._images, texts))

    def of_both(self, images: Tensor, texts: Tensor) -> float:
        """Share of the images that keep their caption."""
        return agreement(self._exact, self._nearest(images, texts))
