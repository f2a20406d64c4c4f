"""When two texts are one: what is compared wherever a text must not be another's negative, or be there twice.

White space of any kind and amount is one space, none is around the text, and the forms of Unicode (composed or not,
ligatures, full width) are one. Capitals count: ``grep -i`` is not ``grep -I``.
"""

from __future__ import annotations

from unicodedata import normalize


def normal_form(text: str) -> str:
    """The spelling that all spellings of a text share."""
    return " ".join(normalize("NFKC", text).split())
