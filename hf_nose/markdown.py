"""Markdown that records are told in: text from outside made harmless, and tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def escape(text: str) -> str:
    """Text from outside (labels, names of data sets and models) as plain words in Markdown, inside a table too."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """
    The lines of a table, the first column to the left, the others to the right; the cells are escaped by whoever made
    them.
    """
    align = ("---", *["---:"] * (len(header) - 1))
    return [f"| {' | '.join(row)} |" for row in (header, align, *rows)]
