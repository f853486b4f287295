"""Text and CSV files that others wrote: what cannot be read is said with the file's name."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

ENCODING = "utf-8-sig"  # with or without the mark that some editors put first


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file in UTF-8, without their ends.

    Raises:
        ValueError: It cannot be opened or is no such file.
    """
    try:
        return path.read_text(encoding=ENCODING).splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error


@contextmanager
def open_table(path: Path) -> Iterator[TextIO]:
    """Opens a CSV or TSV file for ``csv.reader``.

    Raises:
        ValueError: It cannot be opened, or what is read of it inside the block is no such file in UTF-8.
    """
    try:
        with path.open(encoding=ENCODING, newline="") as file:
            yield file
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV or TSV file in UTF-8 ({error})") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
