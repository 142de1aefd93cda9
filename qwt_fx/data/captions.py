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
        extension: "txt", or "json" for an object whose "caption" is the text.

    Raises:
        DataError: not UTF-8, not such an object, or empty.
    """
    text = _decoded(data)
    return check_caption(_from_json(text) if extension == "json" else text)


def decode_captions(data: bytes, extension: str) -> tuple[str, ...]:
    """All captions of one image, each stripped and cut as by `decode_caption`; at least one.

    Args:
        data: UTF-8, byte-order mark tolerated.
        extension: "txt": one caption a line, blank lines left out; "json": a list of texts, or an
            object whose "captions" or "caption" is a list or one text.

    Raises:
        DataError: as `decode_caption`, or a list that holds something else or nothing.
    """
    text = _decoded(data)
    lines = _list_from_json(text) if extension == "json" else _NEWLINE.split(text)
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


def _list_from_json(text: str) -> list[str]:
    """The texts of a JSON list, or of an object's "captions" or "caption"."""
    value = _json_value(text)
    if isinstance(value, dict):
        value = value.get("captions", value.get("caption"))
    texts: object = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(item, str) for item in texts):
        raise DataError('JSON is no list of texts, and has none under "captions" or "caption"')
    return texts


def _from_json(text: str) -> str:
    """The "caption" of a JSON object."""
    value = _json_value(text)
    caption = value.get("caption") if isinstance(value, dict) else None
    if not isinstance(caption, str):
        raise DataError(f'JSON has no text under "caption" (got {type(caption).__name__})')
    return caption
