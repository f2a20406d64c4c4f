"""Raw documents to pretext rows: each paragraph and the one that follows it in the same document."""

from __future__ import annotations

import re
from collections.abc import Iterable

from datasets import Dataset


def consecutive_paragraphs(documents: Iterable[str]) -> Dataset:
    """Split documents at blank lines into the columns ``text`` and ``next``.

    White space inside a paragraph becomes single spaces. A document of one paragraph gives no row, and the same row
    twice counts once.

    Args:
        documents: raw texts.

    Raises:
        ValueError: if no document has two paragraphs.
    """
    rows = {}  # ordered, and each row once
    for document in documents:
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", document)]
        paragraphs = [p for p in paragraphs if p]
        for text, following in zip(paragraphs, paragraphs[1:], strict=False):
            rows[text, following] = None
    if not rows:
        raise ValueError("No document has two paragraphs (separated by a blank line): no text has a next one.")
    texts, nexts = zip(*rows, strict=True)
    return Dataset.from_dict({"text": texts, "next": nexts})
