"""A raw document to the texts it consists of, in order: paragraphs, sentences, or windows of running text.

Each function takes a document and gives its texts, white space inside them made single spaces, none empty. Any other
function of that form serves as well, such as a sentence splitter made for one language.
"""

from __future__ import annotations

import re
from collections.abc import Callable

BLANK_LINE = re.compile(r"\n\s*\n")
# After a full stop, exclamation or question mark and what closes a quotation: white space and what may open a sentence
# (not a small letter), or, after the wide marks of Chinese and Japanese, anything.
SENTENCE_END = re.compile(
    r"""(?<=[.!?…])(["'”’»)\]]*)\s+(?=[^\s\W_a-zà-öø-ÿ]|["'“‘«(\[])|(?<=[。！？])([」』”’）]*)\s*"""
)
# What a full stop after it does not end: titles, initials, and what stands before a number or a name.
ABBREVIATION = re.compile(r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|cf|No|Fig|Eq|e\.g|i\.e|approx|ca)\.)$")


def paragraphs(document: str) -> list[str]:
    """What blank lines separate."""
    return [text for part in BLANK_LINE.split(document) if (text := " ".join(part.split()))]


def sentences(document: str) -> list[str]:
    """Sentences, by their final marks; no sentence crosses a blank line.

    A rule for languages with capital letters and for Chinese and Japanese. It keeps initials and a dozen English
    abbreviations together, and knows no others.
    """
    texts = []
    for paragraph in paragraphs(document):
        start = 0
        for end in SENTENCE_END.finditer(paragraph):
            closed = end.start() + len(end.group(1) or end.group(2) or "")
            if not ABBREVIATION.search(paragraph[start:closed]):
                texts.append(paragraph[start:closed])
                start = end.end()
        if start < len(paragraph):
            texts.append(paragraph[start:])
    return texts


def windows(characters: int) -> Callable[[str], list[str]]:
    """A function that cuts a document into texts of at most ``characters`` characters, at white space where there is
    some in the text's second half.

    Raises:
        ValueError: if ``characters`` is below 2.
    """
    if characters < 2:
        raise ValueError(f"windows(characters={characters}) must be at least 2; 500 characters are about 100 words.")

    def split(document: str) -> list[str]:
        rest, texts = " ".join(document.split()), []
        while rest:
            text = cut(rest, characters)
            texts.append(text)
            rest = rest[len(text) :].lstrip()
        return texts

    return split


def cut(text: str, characters: int) -> str:
    """The beginning of ``text``, at most ``characters`` long, ending at white space where its second half has some."""
    if len(text) <= characters:
        return text
    space = text.rfind(" ", characters // 2, characters + 1)
    return text[: space if space > 0 else characters]
