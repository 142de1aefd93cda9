"""Train the demo CLIP on coloured digit pairs, or render more of its data.

Train (writes model.json, model.safetensors and metrics.json under --output):

    python benchmarks/demo_model/train.py --output build/demo-model

Render further validation images (class folders 0000 to 1599) or calibration shards:

    python benchmarks/demo_model/train.py --render-val 10000 --seed 1 --output build/val
    python benchmarks/demo_model/train.py --render-calib 2048 --seed 1 --output build/calib

The model is open_clip's own ``CLIP`` with its own tokenizer; only the training loop's forward
is written out here, because captions are cut after the longest of the batch (exact under the
causal mask), attention is plain matrix products (their bf16 backward is several times faster
on CPUs than the fused kernel's) and QuickGELU is SiLU with a scale.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import render
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor, nn

MASSIVE_CHANNELS = 4
"""Channels of the position embedding of position 0 that start large, in each tower."""
_LN_PRE_GAIN = 3.0
_QUICK_GELU = 1.702


def model_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return the model in open_clip's own configuration schema."""
    return {
        "embed_dim": args.embed_dim,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": [render.HEIGHT, render.WIDTH],
            "patch_size": 8,
            "layers": args.layers,
            "width": args.width,
            "head_width": args.head_width,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "layers": args.text_layers,
            "width": args.text_width,
            "heads": args.text_width // 32,
        },
    }


def plant_massive_tokens(model: CLIP, seed: int) -> dict[str, list[int]]:
    """Make a few channels of the class token and of SOT large; return the channels per tower.

    Position 0 gets +-8 to 15 in ``MASSIVE_CHANNELS`` channels. ``ln_pre`` would bring the class
    token back to unit variance, so its gain is raised there, and what the patches put into these
    channels is lowered by as much.
    """
    generator = torch.Generator().manual_seed(seed)
    channels = {}
    with torch.no_grad():
        for tower, table in (
            ("image", model.visual.positional_embedding),
            ("text", model.positional_embedding),
        ):
            chosen = torch.randperm(table.shape[1], generator=generator)[:MASSIVE_CHANNELS]
            size = 8.0 + 7.0 * torch.rand(MASSIVE_CHANNELS, generator=generator)
            sign = 2.0 * torch.randint(2, (MASSIVE_CHANNELS,), generator=generator) - 1.0
            table[0, chosen] = sign * size
            if tower == "image":
                table[1:, chosen] /= _LN_PRE_GAIN
                model.visual.conv1.weight[chosen] /= _LN_PRE_GAIN
                model.visual.ln_pre.weight[chosen] *= _LN_PRE_GAIN
            channels[tower] = sorted(int(c) for c in chosen)
    return channels


def run_blocks(blocks: nn.ModuleList, x: Tensor, mask: Tensor | None) -> Tensor:
    """Run residual attention blocks on ``x`` (n, length, width); ``mask`` (length, length)."""
    block: Any
    for block in blocks:
        n, length, width = x.shape
        heads = block.attn.num_heads
        weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        qkv = F.linear(block.ln_1(x), weight, bias)
        q, k, v = qkv.view(n, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        scores = ((q * (width // heads) ** -0.5) @ k.transpose(-1, -2)).float()
        if mask is not None:
            scores = scores + mask
        mixed = scores.softmax(-1).to(v.dtype) @ v
        x = x + block.attn.out_proj(mixed.transpose(1, 2).reshape(n, length, width))
        hidden = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(F.silu(hidden * _QUICK_GELU) * (1 / _QUICK_GELU))
    return x


def encode_image(model: CLIP, pixels: Tensor) -> Tensor:
    """Encode normalized ``pixels`` (n, 3, 32, 48) to unit vectors (n, embed_dim)."""
    tower = model.visual
    x = tower.conv1(pixels).flatten(2).transpose(1, 2)
    start = tower.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = tower.ln_pre(torch.cat([start, x], dim=1) + tower.positional_embedding)
    x = run_blocks(tower.transformer.resblocks, x, None)
    return F.normalize((tower.ln_post(x[:, 0]) @ tower.proj).float(), dim=-1)


def encode_text(model: CLIP, tokens: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """Encode ``tokens`` (n, 77) int64 to unit vectors (n, embed_dim).

    ``table`` (r, width) holds the embeddings of the token ids ``rows`` (r,), sorted.
    """
    ends = tokens.argmax(dim=-1)
    length = int(ends.max()) + 1
    known = torch.searchsorted(rows, tokens[:, :length].contiguous())
    x = table[known] + model.positional_embedding[:length]
    x = run_blocks(model.transformer.resblocks, x, model.attn_mask[:length, :length])
    x = model.ln_final(x[torch.arange(len(x)), ends])
    return F.normalize((x @ model.text_projection).float(), dim=-1)


def normalize_pixels(images: Tensor) -> Tensor:
    """(n, 32, 48, 3) uint8 to (n, 3, 32, 48) float32, as open_clip's preprocessing does."""
    mean, std = torch.tensor(OPENAI_DATASET_MEAN), torch.tensor(OPENAI_DATASET_STD)
    return ((images.float() / 255.0 - mean) / std).permute(0, 3, 1, 2)


@torch.no_grad()
def class_embeddings(model: CLIP, tokens: Tensor) -> Tensor:
    """Average ``tokens`` (templates, 1600, 77) into unit class embeddings (1600, embed_dim)."""
    features = [
        torch.cat([model.encode_text(part, normalize=True) for part in torch.split(group, 256)])
        for group in tokens
    ]
    return F.normalize(torch.stack(features).mean(dim=0), dim=-1)


@torch.no_grad()
def zero_shot_accuracy(model: CLIP, classes: Tensor, images: Tensor, labels: Tensor) -> float:
    """Return the top-1 share of ``images`` (n, 32, 48, 3) uint8 with ``labels`` (n,)."""
    hits = 0
    for part, truth in zip(torch.split(images, 256), torch.split(labels, 256), strict=True):
        features = model.encode_image(normalize_pixels(part), normalize=True)
        hits += int(((features @ classes.T).argmax(dim=-1) == truth).sum())
    return hits / len(labels)


@torch.no_grad()
def massive_ratios(
    model: CLIP, channels: dict[str, list[int]], pixels: Tensor, tokens: Tensor
) -> dict[str, list[float]]:
    """Per block output: mean |x| of the planted channels at position 0 over mean |x| elsewhere."""
    ratios: dict[str, list[float]] = {}
    for tower, blocks in (
        ("image", model.visual.transformer.resblocks),
        ("text", model.transformer.resblocks),
    ):
        outputs: list[Tensor] = []

        def keep(
            _block: nn.Module, _inputs: object, out: Tensor, kept: list[Tensor] = outputs
        ) -> None:
            kept.append(out)

        hooks = [block.register_forward_hook(keep) for block in blocks]
        _ = model.encode_image(pixels) if tower == "image" else model.encode_text(tokens)
        for hook in hooks:
            hook.remove()
        valid = torch.ones(outputs[0].shape[:2], dtype=torch.bool)
        if tower == "text":
            valid = torch.arange(tokens.shape[1]) <= tokens.argmax(dim=-1, keepdim=True)
        valid[:, 0] = False
        ratios[tower] = [
            round(float(x[:, 0, channels[tower]].abs().mean() / x[valid].abs().mean()), 1)
            for x in outputs
        ]
    return ratios


def render_pool(per_class: int, seed: int) -> Tensor:
    """Draw ``per_class`` training images of each class: (1600, per_class, 32, 48, 3) uint8."""
    digits = render.load_digit_set("train")
    total = len(render.class_names())
    pool = np.empty((total, per_class, render.HEIGHT, render.WIDTH, 3), dtype=np.uint8)
    for label in range(total):
        pool[label] = render.render_batch(digits, [label] * per_class, seed, label * per_class)
    return torch.from_numpy(pool)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < args.warmup:
        return float(args.lr * (step + 1) / args.warmup)
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return float(args.lr * 0.5 * (1.0 + math.cos(math.pi * done)))


def parameter_groups(model: CLIP, table: nn.Parameter, decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only: not for norms, biases, embeddings or the logit scale."""
    decayed: list[Tensor] = []
    free: list[Tensor] = [table]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and "embedding" not in name
            (decayed if matrix else free).append(parameter)
    return [{"params": decayed, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]


def tokenize(templates: tuple[str, ...]) -> Tensor:
    """Tokenize every class name in every template: (templates, 1600, 77) int64."""
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    names = render.class_names()
    return torch.stack([tokenizer([style.format(name) for name in names]) for style in templates])


def store_half(model: CLIP, rows: Tensor) -> None:
    """Round every weight to fp16, in place, and zero the token rows that never occur."""
    with torch.no_grad():
        kept = model.token_embedding.weight[rows].clone()
        model.token_embedding.weight.zero_()
        model.token_embedding.weight[rows] = kept
        for tensor in model.state_dict().values():
            tensor.copy_(tensor.half().float())


def train(args: argparse.Namespace) -> None:
    """Train one model and write it, its configuration and its metrics."""
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    config = model_config(args)
    model = CLIP(**config)
    channels = plant_massive_tokens(model, args.seed)

    tokens = tokenize(render.CAPTION_TEMPLATES)
    rows = torch.unique(tokens)
    model.token_embedding.weight.requires_grad_(False)
    table = nn.Parameter(model.token_embedding.weight[rows].clone())
    optimizer = torch.optim.AdamW(
        parameter_groups(model, table, args.weight_decay), betas=(0.9, 0.98), fused=True
    )
    started = time.perf_counter()
    pool = render_pool(args.images_per_class, args.seed)
    digits = render.load_digit_set("validation")
    labels = render.balanced_classes(args.validation, args.seed + 1_000)
    held_out = torch.from_numpy(render.render_batch(digits, labels, args.seed + 1_000, 0))
    truth = torch.from_numpy(labels)
    print(f"rendered {pool.shape[0] * pool.shape[1]} images", flush=True)

    evaluation = tokens[: len(render.EVALUATION_TEMPLATES)]
    generator = torch.Generator().manual_seed(args.seed)
    target = torch.arange(args.batch_size)
    for step in range(args.steps):
        # Distinct classes, so that the diagonal is the only match.
        classes = torch.randperm(len(pool), generator=generator)[: args.batch_size]
        draw = torch.randint(pool.shape[1], (args.batch_size,), generator=generator)
        style = torch.randint(len(tokens), (args.batch_size,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            image = encode_image(model, normalize_pixels(pool[classes, draw]))
            text = encode_text(model, tokens[style, classes], rows, table)
        logits = model.logit_scale.exp() * image @ text.T
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, math.log(100.0))
        if step % 50 == 0:
            elapsed = time.perf_counter() - started
            print(
                f"step {step} loss {loss.item():.4f} norm {float(norm):.2f}"
                f" scale {model.logit_scale.exp().item():.1f} {elapsed:.0f} s",
                flush=True,
            )
        if (step + 1) % args.evaluate_every == 0 and step + 1 < args.steps:
            with torch.no_grad():
                model.token_embedding.weight[rows] = table
            known = class_embeddings(model, evaluation)
            top1 = zero_shot_accuracy(model, known, held_out[:2000], truth[:2000])
            print(f"step {step + 1} top-1 {top1:.4f}", flush=True)
    seconds = time.perf_counter() - started

    with torch.no_grad():
        model.token_embedding.weight[rows] = table
    model.eval()
    store_half(model, rows)
    known = class_embeddings(model, evaluation)
    own = zero_shot_accuracy(model, known, pool[:, 0], torch.arange(len(pool)))
    metrics = {
        "top1": zero_shot_accuracy(model, known, held_out, truth),
        "validation_images": args.validation,
        "top1_training_digits": own,
        "final_loss": loss.item(),
        "seconds": round(seconds),
        "massive_channels": channels,
        "massive_ratios": massive_ratios(
            model, channels, normalize_pixels(held_out[:256]), evaluation[0, :256]
        ),
        "arguments": {k: v for k, v in vars(args).items() if isinstance(v, int | float)},
    }
    print(json.dumps(metrics), flush=True)
    (args.output / "model.json").write_text(json.dumps(config, indent=2) + "\n")
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, args.output / "model.safetensors")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the demo CLIP or render its data.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--render-val", type=int, metavar="N", help="render N validation images")
    parser.add_argument("--render-calib", type=int, metavar="N", help="render N calibration pairs")
    parser.add_argument("--shards", type=int, default=4, help="shards of --render-calib")
    parser.add_argument("--embed-dim", type=int, default=96)
    parser.add_argument("--width", type=int, default=128, help="image tower")
    parser.add_argument("--layers", type=int, default=8, help="image tower")
    parser.add_argument("--head-width", type=int, default=32, help="image tower")
    parser.add_argument("--text-width", type=int, default=96, help="a multiple of 32")
    parser.add_argument("--text-layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--images-per-class", type=int, default=96, help="training images drawn")
    parser.add_argument("--validation", type=int, default=10_000, help="images of the last test")
    parser.add_argument("--evaluate-every", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = parse_arguments()
    if args.render_val is not None:
        render.write_image_folder(args.output, args.render_val, args.seed)
    elif args.render_calib is not None:
        sizes = np.bincount(np.arange(args.render_calib) % args.shards, minlength=args.shards)
        render.write_shards(args.output, [int(size) for size in sizes], args.seed)
    else:
        train(args)


if __name__ == "__main__":
    main()
