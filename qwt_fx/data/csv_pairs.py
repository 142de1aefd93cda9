"""Image-caption pairs listed in open_clip's csv: tab-separated, `filepath` and `title`."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator

from qwt_fx.data.samples import FilePair
from qwt_fx.errors import DataError

COLUMNS = ("filepath", "title")


def read_csv(path: str) -> Iterator[FilePair]:
    """The pairs of the file, row by row; relative image paths start at the file's folder.

    Raises:
        DataError: unreadable, not UTF-8, a column missing, a row without it, or no rows.
    """
    folder = os.path.dirname(os.path.abspath(path))
    rows = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            found = reader.fieldnames or []
            if missing := [name for name in COLUMNS if name not in found]:
                raise DataError(
                    f"{path}: no column {missing[0]!r} (got {', '.join(map(repr, found))}); "
                    "wanted tab-separated columns 'filepath' and 'title'"
                )
            for row in reader:
                image, title = row["filepath"], row["title"]
                if not image or title is None:
                    raise DataError(
                        f"{path}: line {reader.line_num} lacks a filepath or a title; "
                        "wanted both, separated by a tab"
                    )
                rows += 1
                yield FilePair(os.path.join(folder, image), title)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except ValueError as error:  # a path with a zero byte
        raise DataError(f"{path!r}: cannot be read ({error})") from error
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: not tab-separated ({error})") from error
    if rows == 0:
        raise DataError(f"{path}: no rows below the header, wanted at least one image")
