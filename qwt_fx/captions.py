"""Captions from the bytes of a `.txt` or `.json` member."""

from __future__ import annotations

import json

from qwt_fx.errors import DataError

# Far beyond what fits 77 tokens; BPE takes quadratic time on one endless word.
MAX_CAPTION_CHARS = 10_000


def decode_caption(data: bytes, extension: str) -> str:
    """The caption in `data`, stripped, cut to `MAX_CAPTION_CHARS`.

    Args:
        data: UTF-8, byte-order mark tolerated.
        extension: "txt", or "json" for an object whose "caption" is the text.

    Raises:
        DataError: not UTF-8, not such an object, or empty.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"caption is not UTF-8 ({error.reason} at byte {error.start})") from error
    return check_caption(_from_json(text) if extension == "json" else text)


def check_caption(text: str) -> str:
    """`text` stripped and cut to `MAX_CAPTION_CHARS`. Raises `DataError` when nothing is left."""
    text = text.strip()[:MAX_CAPTION_CHARS]
    if not text:
        raise DataError("caption is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may spell half a surrogate pair; tokenizers choke
        raise DataError("caption holds half a surrogate pair") from error
    return text


def _from_json(text: str) -> str:
    """The "caption" of a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"caption is not JSON ({error})") from error
    caption = value.get("caption") if isinstance(value, dict) else None
    if not isinstance(caption, str):
        raise DataError(f'JSON has no text under "caption" (got {type(caption).__name__})')
    return caption
