"""Text files of users: lists of names, and tables of images and masks."""

from __future__ import annotations

import codecs
import csv
import io
import os
import pathlib
import re

from deeplab_jax.data.io import images
from deeplab_jax.utils.errors import UserError

# UTF-32's mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: pathlib.Path, errors: str = "strict") -> str:
    """Reads a text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, as of PowerShell.

    `errors` is "surrogateescape" for names of files, which need not be UTF-8.

    Raises:
      UserError: the file cannot be read, or has another encoding.
    """
    data = images.read_bytes(path)
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding, errors)
    except UnicodeError:
        raise UserError(
            f"{path}: is not {encoding.removesuffix('-sig').upper()} text. Save it as UTF-8"
        ) from None
    if errors == "surrogateescape":  # names as the operating system gives them, in any locale
        text = os.fsdecode(text.encode(errors=errors))
    if "\0" in text:
        raise UserError(
            f"{path}: holds zero bytes, as UTF-16 text without a byte order mark does, or a file "
            "that is not text. Save it as UTF-8"
        )
    return text


def read_lines(path: pathlib.Path) -> list[str]:
    """Reads the lines of a list of names, without blank lines and comments, each once."""
    lines = map(str.strip, read_text(path, "surrogateescape").splitlines())
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def split_line(line: str) -> list[list[str]]:
    """Splits a line in each way that may be meant: not at all, at tabs, semicolons, ..."""
    ways = [[line], *(re.split(separator, line) for separator in ("\t+", ";", ",", r"\s+"))]
    return [[field.strip().strip("\"'") for field in fields] for fields in ways]


def read_table(path: pathlib.Path) -> dict[int, dict[str, str]]:
    """Reads the columns image, mask and split of a CSV table; keys are the line numbers.

    Its separator is the one of `,`, `;`, tab and `|` that is most frequent in the first line.

    Raises:
      UserError: the file is not such a table.
    """
    text = read_text(path, "surrogateescape")
    num_skipped = int(text.lower().startswith("sep="))  # a first line of Excel's
    text = text.partition("\n")[2] if num_skipped else text
    separator = max(",;\t|", key=text.partition("\n")[0].count)
    table = csv.DictReader(
        io.StringIO(text, newline=""), restval="", skipinitialspace=True, delimiter=separator
    )
    try:
        columns = [column.strip().lower() for column in table.fieldnames or ()]
        table.fieldnames = columns
        rows = [(table.line_num + num_skipped, row) for row in table]
    except csv.Error as error:
        raise UserError(f"{path}: line {table.line_num} is not CSV ({error})") from None
    if not {"image", "mask"} <= set(columns):
        raise UserError(
            f"{path}: the first line must name the columns image, mask and, optionally, split, as "
            f"in `image,mask,split`; it is {separator.join(columns)[:80]!r}. If config.data.root "
            "is a file, it must be a CSV."
        )
    if not rows:
        raise UserError(f"{path}: names no image; expected a row for each image")
    return {
        line: {column: row.get(column, "").strip() for column in ("image", "mask", "split")}
        for line, row in rows
    }
