"""RepQ-ViT and QwT on a CLIP image tower the plain way: modules, loops over channels, kept features.

What a reader of the two papers would write first, and what their code amounts to: ranges from one
batch, one channel after another; QwT from features of every sample that stay in memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PERCENTILES = (0.999, 0.9999, 0.99999)
_QUANTILE_LIMIT = 16_000_000  # torch.quantile takes no more elements


@dataclass
class Clock:
    """CPU seconds spent in range search and statistics, and in everything."""

    search: float = 0.0
    total: float = 0.0


def _quantile(x: Tensor, p: float) -> Tensor:
    if x.numel() > _QUANTILE_LIMIT:
        return torch.tensor(np.percentile(x.numpy(), 100.0 * p), dtype=x.dtype)
    return torch.quantile(x, p)


def search_channel(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of one flat tensor: the percentile range with the least squared error."""
    levels = 2**bits - 1
    best, least = (torch.tensor(1.0), torch.tensor(0.0)), float("inf")
    for p in PERCENTILES:
        high, low = _quantile(x, p), _quantile(x, 1.0 - p)
        scale = (high - low) / levels
        zero = torch.round(-low / scale)
        codes = torch.clamp(torch.round(x / scale) + zero, 0, levels)
        error = float((((codes - zero) * scale - x) ** 2).mean())
        if error < least:
            best, least = (scale, zero), error
    return best


@dataclass
class Quantizer:
    """One fake-quantizer; `axis` is a channel axis or `None`."""

    bits: int
    axis: int | None
    clock: Clock
    scale: Tensor | None = None
    zero: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """Search the range, channel by channel."""
        begun = time.process_time()
        if self.axis is None:
            self.scale, self.zero = search_channel(x.reshape(-1), self.bits)
        else:
            rows = x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)
            found = [search_channel(row, self.bits) for row in rows]
            shape = [1] * x.dim()
            shape[self.axis] = -1
            self.scale = torch.stack([s for s, _ in found]).reshape(shape)
            self.zero = torch.stack([z for _, z in found]).reshape(shape)
        self.clock.search += time.process_time() - begun

    def __call__(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.observe(x)
        codes = torch.round(x / self.scale) + self.zero
        return (codes.clamp(0, 2**self.bits - 1) - self.zero) * self.scale


class Linear:
    """A linear with quantized input and weight."""

    def __init__(
        self, weight: Tensor, bias: Tensor, bits: int, per_channel: bool, clock: Clock
    ) -> None:
        self.weight, self.bias = weight.clone(), bias.clone()
        self.input = Quantizer(bits, -1 if per_channel else None, clock)
        self.rows = Quantizer(bits, 0, clock)
        self.on = True

    def __call__(self, x: Tensor) -> Tensor:
        if not self.on:
            return F.linear(x, self.weight, self.bias)
        return F.linear(self.input(x), self.rows(self.weight), self.bias)


class Block:
    """A residual attention block of open_clip with quantized linears and QwT's compensation."""

    def __init__(self, block: nn.Module, bits: int, clock: Clock) -> None:
        self.heads = block.attn.num_heads
        self.ln_1 = [block.ln_1.weight.clone(), block.ln_1.bias.clone()]
        self.ln_2 = [block.ln_2.weight.clone(), block.ln_2.bias.clone()]
        self.qkv = Linear(block.attn.in_proj_weight, block.attn.in_proj_bias, bits, True, clock)
        out = block.attn.out_proj
        self.proj = Linear(out.weight, out.bias, bits, False, clock)
        self.fc1 = Linear(block.mlp.c_fc.weight, block.mlp.c_fc.bias, bits, True, clock)
        self.fc2 = Linear(block.mlp.c_proj.weight, block.mlp.c_proj.bias, bits, False, clock)
        self.compensation: tuple[Tensor, Tensor] | None = None

    def switch(self, on: bool) -> None:
        """Quantize or not."""
        for linear in (self.qkv, self.proj, self.fc1, self.fc2):
            linear.on = on

    def __call__(self, x: Tensor) -> Tensor:
        source = x
        n, length, width = x.shape
        y = F.layer_norm(x, (width,), *self.ln_1)
        q, k, v = self.qkv(y).chunk(3, dim=-1)
        q, k, v = (t.reshape(n, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        scores = (q / (width // self.heads) ** 0.5) @ k.transpose(-2, -1)
        y = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(n, length, width)
        x = x + self.proj(y)
        y = self.fc1(F.layer_norm(x, (width,), *self.ln_2))
        x = x + self.fc2(y * torch.sigmoid(1.702 * y))
        if self.compensation is not None and self.qkv.on:
            weight, bias = self.compensation
            x = x + source @ weight + bias
        return x

    def reparameterize(self) -> None:
        """Per-channel scales of both norms' outputs move into norms and weights."""
        for norm, linear in ((self.ln_1, self.qkv), (self.ln_2, self.fc1)):
            quantizer = linear.input
            scale, zero = quantizer.scale.flatten(), quantizer.zero.flatten()
            r1, r2 = scale / scale.mean(), zero - zero.mean()
            norm[0] = norm[0] / r1
            norm[1] = (norm[1] + scale * r2) / r1
            linear.bias = linear.bias - linear.weight @ (scale * r2)
            linear.weight = linear.weight * r1
            quantizer.scale, quantizer.zero, quantizer.axis = scale.mean(), zero.mean(), None
            linear.rows.scale = None
            linear.rows.observe(linear.weight)


@dataclass
class ImageTower:
    """The image tower, quantized."""

    visual: nn.Module
    bits: int
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        resblocks = self.visual.transformer.resblocks
        self.blocks = [Block(b, self.bits, self.clock) for b in resblocks]
        self.image = Quantizer(8, None, self.clock)
        self.patches = Quantizer(self.bits, 0, self.clock)

    def stem(self, x: Tensor) -> Tensor:
        """Patches, class token, positions, the first norm."""
        conv = self.visual.conv1
        x = F.conv2d(self.image(x), self.patches(conv.weight), conv.bias, conv.stride)
        x = x.flatten(2).transpose(1, 2)
        token = self.visual.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([token, x], dim=1) + self.visual.positional_embedding
        return self.visual.ln_pre(x)

    @torch.no_grad()
    def quantize(self, images: Tensor, batch: int) -> None:
        """Ranges from the first batch, reparameterization, then QwT block by block."""
        begun = time.process_time()
        batches = list(images.split(batch))
        x = self.stem(batches[0])
        for block in self.blocks:
            x = block(x)
        for block in self.blocks:
            block.reparameterize()
        features = torch.cat([self.stem(b) for b in batches])
        for block in self.blocks:
            block.switch(False)
            floating = torch.cat([block(b) for b in features.split(batch)])
            block.switch(True)
            quantized = torch.cat([block(b) for b in features.split(batch)])
            statistics = time.process_time()
            block.compensation = solve(features, floating - quantized)
            self.clock.search += time.process_time() - statistics
            features = torch.cat([block(b) for b in features.split(batch)])
        self.clock.total += time.process_time() - begun


def solve(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
    """QwT's closed form on [x 1], float32 as published; `None` where it explains nothing."""
    width = x.shape[-1]
    rows, target = x.reshape(-1, width), y.reshape(-1, width)
    ones = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    solution = torch.linalg.pinv(ones.T @ ones) @ (ones.T @ target)
    missed = (target - ones @ solution).square().sum()
    total = (target - target.mean(dim=0)).square().sum()
    return (solution[:-1], solution[-1]) if bool(missed < total) else None
