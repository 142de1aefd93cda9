"""Which members of a sample are its image and its caption: the first that is there of those named.

As webdataset and open_clip write them: `jpg;png;webp`, `txt;caption`, and `json:text` for a key of a
JSON member. A member's extension is what follows the first dot of its name, as webdataset splits names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qwt_fx.errors import ConfigError

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
CAPTION_KEYS = ("txt", "json:caption")
JSON = "json"


@dataclass(frozen=True)
class SampleKeys:
    """What to look for in each sample.

    Attributes:
        image, caption: extensions (columns of a csv file), the first that is there counts; empty for
            the format's own. `json:KEY` is a key of a JSON member.
        captioned: a sample without a caption is passed over; else its caption is empty.
    """

    image: tuple[str, ...] = ()
    caption: tuple[str, ...] = ()
    captioned: bool = True

    @staticmethod
    def parse(image: str | None, caption: str | None) -> SampleKeys:
        """From texts of names joined by `;`. Raises `ConfigError` for an empty name, or JSON images."""
        keys = SampleKeys(_names("--image-key", image), _names("--caption-key", caption))
        if wrong := [name for name in keys.image if ":" in name]:
            raise ConfigError(
                f"--image-key: got {wrong[0]!r}, wanted extensions such as jpg;png;webp"
            )
        if wrong := [n for n in keys.caption if ":" in n and not n.startswith(f"{JSON}:")]:
            raise ConfigError(
                f"--caption-key: got {wrong[0]!r}, wanted such as txt;caption;json:text"
            )
        return keys

    def without_captions(self) -> SampleKeys:
        """The same, where captions are not needed."""
        return replace(self, captioned=False)

    @property
    def image_names(self) -> tuple[str, ...]:
        """Extensions of images."""
        return self.image or IMAGE_KEYS

    @property
    def caption_names(self) -> tuple[str, ...]:
        """Extensions of captions, `json` with its key."""
        return tuple("json:caption" if n == JSON else n for n in self.caption or CAPTION_KEYS)

    def image_in(self, files: Mapping[str, object]) -> str | None:
        """The extension of a sample's image."""
        return next((name for name in self.image_names if name in files), None)

    def caption_in(self, files: Mapping[str, object]) -> str | None:
        """The name of a sample's caption, `json` with its key."""
        return next((name for name in self.caption_names if extension_of(name) in files), None)


USUAL = SampleKeys()


def extension_of(name: str) -> str:
    """The extension of the member that holds a caption."""
    return name.partition(":")[0]


def _names(flag: str, text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    names = tuple(name.strip().removeprefix(".") for name in text.split(";"))
    if not all(names) or any(name.endswith(":") for name in names):
        raise ConfigError(f"{flag}: got {text!r}, wanted names joined by ; such as jpg;png")
    return tuple(_lower(name) for name in names)


def _lower(name: str) -> str:
    """Extensions are compared in lower case; the key of a JSON member is not."""
    extension, colon, key = name.partition(":")
    return extension.lower() + colon + key
