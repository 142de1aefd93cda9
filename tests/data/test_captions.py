"""Captions out of bytes."""

from __future__ import annotations

import pytest

from qwt_fx.data.captions import MAX_CAPTION_CHARS, decode_caption
from qwt_fx.errors import DataError


@pytest.mark.parametrize(
    ("data", "extension", "caption"),
    [
        (b" a cat \n", "txt", "a cat"),
        (b"\xef\xbb\xbfa cat", "txt", "a cat"),
        ("猫と犬 🐈".encode(), "txt", "猫と犬 🐈"),
        (b'{"caption": "a cat", "url": 3}', "json", "a cat"),
        (b"a" * 50_000, "txt", "a" * MAX_CAPTION_CHARS),
    ],
)
def test_captions_are_text_without_margins(data: bytes, extension: str, caption: str) -> None:
    assert decode_caption(data, extension) == caption


@pytest.mark.parametrize(
    ("data", "extension", "message"),
    [
        (b" \n ", "txt", "empty"),
        (b"caf\xe9", "txt", "not UTF-8 .* at byte 3"),
        (b"{", "json", "not JSON"),
        (b"[" * 100_000, "json", "not JSON"),
        (b"[]", "json", 'no text under "caption"'),
        (b'{"caption": null}', "json", "got NoneType"),
        (b'{"caption": "\\ud800"}', "json", "surrogate"),
    ],
)
def test_what_is_no_caption_says_why(data: bytes, extension: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_caption(data, extension)
