"""Photographs that scikit-image and scikit-learn carry, and random crops of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from real.packages import wheel

# Git LFS pointers and volumes are left out: what is no two-dimensional picture.
_SKIMAGE = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png",
    "color.png", "grass.png", "gravel.png", "horse.png", "hubble_deep_field.jpg", "ihc.png",
    "logo.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip
_SKLEARN = ("china.jpg", "flower.jpg")
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def photographs(cache: Path) -> list[Image.Image]:
    """The pictures in RGB, in a fixed order."""
    found = []
    for name, folder, files in (
        ("scikit-image", "skimage/data", _SKIMAGE),
        ("scikit-learn", "sklearn/datasets/images", _SKLEARN),
    ):
        with wheel(name, cache) as archive:
            members = set(archive.namelist())
            for file in files:
                if f"{folder}/{file}" in members:
                    data = archive.read(f"{folder}/{file}")
                    found.append(Image.open(io.BytesIO(data)).convert("RGB"))
    return found


def crops(pictures: list[Image.Image], count: int, seed: int, size: int) -> Tensor:
    """(count, 3, size, size): crops of 12 to 100 % of the area, 3:4 to 4:3, the pictures in turn."""
    generator = np.random.default_rng(seed)
    made = []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        width, height = picture.size
        area = generator.uniform(0.12, 1.0) * width * height
        ratio = np.exp(generator.uniform(np.log(0.75), np.log(4 / 3)))
        wide, high = min(width, int((area * ratio) ** 0.5)), min(height, int((area / ratio) ** 0.5))
        left = int(generator.integers(0, width - wide + 1))
        top = int(generator.integers(0, height - high + 1))
        box = (left, top, left + wide, top + high)
        crop = picture.crop(box).resize((size, size), Image.Resampling.BICUBIC)
        pixels = torch.tensor(np.asarray(crop)).permute(2, 0, 1).float() / 255
        made.append((pixels - MEAN) / STD)
    return torch.stack(made)
