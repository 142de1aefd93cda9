"""Captions from the bytes of a `.txt` or `.json` member."""

from __future__ import annotations

import json
import re

from qwt_fx.errors import DataError

# Far beyond what fits 77 tokens; BPE takes quadratic time on one endless word.
MAX_CAPTION_CHARS = 10_000

# Not str.splitlines, which also splits at form feeds and Unicode separators.
_NEWLINE = re.compile(r"\r\n|[\r\n]")


def decode_caption(data: bytes, extension: str) -> str:
    """The caption in `data`, stripped, cut to `MAX_CAPTION_CHARS`.

    Args:
        data: UTF-8, byte-order mark tolerated.
        extension: "json:KEY" for an object whose KEY is the text; any other for text.

    Raises:
        DataError: not UTF-8, not such an object, or empty.
    """
    text = _decoded(data)
    kind, _, key = extension.partition(":")
    return check_caption(_from_json(text, key or "caption") if kind == "json" else text)


def decode_captions(data: bytes, extension: str) -> tuple[str, ...]:
    """All captions of one image, each stripped and cut as by `decode_caption`; at least one.

    Args:
        data: UTF-8, byte-order mark tolerated.
        extension: "json:KEY": a list of texts, or an object whose KEY (for "caption" also
            "captions") is a list or one text; any other: one caption a line, blank lines left out.

    Raises:
        DataError: as `decode_caption`, or a list that holds something else or nothing.
    """
    text = _decoded(data)
    kind, _, key = extension.partition(":")
    lines = _list_from_json(text, key or "caption") if kind == "json" else _NEWLINE.split(text)
    captions = tuple(check_caption(line) for line in lines if line.strip())
    if not captions:
        raise DataError("caption is empty")
    return captions


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


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"caption is not UTF-8 ({error.reason} at byte {error.start})") from error


def _json_value(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"caption is not JSON ({error})") from error


def _list_from_json(text: str, key: str) -> list[str]:
    """The texts of a JSON list, or of an object's key; of "captions" before "caption"."""
    value = _json_value(text)
    if isinstance(value, dict):
        value = value.get("captions", value.get(key)) if key == "caption" else value.get(key)
    texts: object = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(item, str) for item in texts):
        named = '"captions" or "caption"' if key == "caption" else f'"{key}"'
        raise DataError(f"JSON is no list of texts, and has none under {named}")
    return texts


def _from_json(text: str, key: str) -> str:
    """The text under a key of a JSON object."""
    value = _json_value(text)
    caption = value.get(key) if isinstance(value, dict) else None
    if not isinstance(caption, str):
        raise DataError(f'JSON has no text under "{key}" (got {type(caption).__name__})')
    return caption
