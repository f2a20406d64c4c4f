"""Raw documents to LLaRA's pretext rows (arXiv 2312.15503): each text and the one that follows it in its document.

Columns ``text, next``, or ``text, next, target`` where stop words are left out of what the embeddings must predict.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value

from .splitting import cut, paragraphs

logger = logging.getLogger(__name__)
WORD = re.compile(r"\w+(?:['’\-.]\w+)*")


def consecutive_texts(
    documents: Dataset | IterableDataset | Iterable[str | Sequence[str]],
    split: Callable[[str], Sequence[str]] = paragraphs,
    *,
    document_column: str | None = None,
    max_characters: int | None = None,
    stop_words: Collection[str] | None = None,
    keep_last: bool = False,
    counts: Counter[str] | None = None,
) -> Dataset | IterableDataset:
    """Split documents into texts, and pair each with the next one of its document.

    Args:
        documents: a data set with a column ``text``, or documents one by one, each a string or a sequence of strings
            in order. An ``IterableDataset`` is read as it streams and gives one; all else is held in memory.
        split: ``paragraphs`` (at blank lines), ``sentences``, ``windows(characters)``, or a function of your own from
            a string to its texts in order.
        document_column: the column that names each row's document, where a data set's rows are the texts of documents
            in order. Rows of one document follow each other.
        max_characters: the length in characters that texts are cut to, at white space. Default: they are not cut.
        stop_words: the words, in lower case, that the embeddings need not predict, such as
            ``sklearn.feature_extraction.text.ENGLISH_STOP_WORDS``. They and all punctuation are left out of ``next``
            and of ``target``, a third column with the other words of ``text``.
        keep_last: whether the last text of a document is a row too, with an empty ``next``: EBAE and MNTP learn of it.
        counts: a counter, emptied and then filled: ``documents``, those with a single text (``without next``),
            ``empty`` ones, ``rows``, and ``duplicates``: rows whose ``text`` and ``next`` came before, of which the
            first is kept. For a stream, as its rows pass, in the process that reads them.

    Raises:
        ValueError: for a data set without the columns, or if no document has two texts (with ``keep_last``: one); of a
            stream, when it is read to its end.
    """
    counts = Counter() if counts is None else counts
    if isinstance(documents, (Dataset, IterableDataset)):
        _check_columns(documents, document_column)
    columns = ["text", "next"] if stop_words is None else ["text", "next", "target"]
    arguments: dict[str, Any] = {
        "documents": documents,
        "split": split,
        "document_column": document_column,
        "max_characters": max_characters,
        "stop_words": stop_words if stop_words is None else frozenset(stop_words),
        "keep_last": keep_last,
        "counts": counts,
    }
    features = Features({column: Value("string") for column in columns})
    if isinstance(documents, IterableDataset):
        return IterableDataset.from_generator(_rows, features=features, gen_kwargs=arguments)
    return Dataset.from_list(list(_rows(**arguments)), features=features)


def _check_columns(documents: Dataset | IterableDataset, document_column: str | None) -> None:
    columns = documents.column_names or list(next(iter(documents), {}))
    if missing := [name for name in ("text", document_column) if name and name not in columns]:
        raise ValueError(
            f"The documents have the columns {columns} and lack {missing}. Rename yours: "
            f"documents.rename_column('...', {missing[0]!r})."
        )


def _rows(
    documents: Iterable[Any],
    split: Callable[[str], Sequence[str]],
    document_column: str | None,
    max_characters: int | None,
    stop_words: frozenset[str] | None,
    keep_last: bool,
    counts: Counter[str],
) -> Iterator[dict[str, str]]:
    counts.clear()
    seen = set()  # hashes, not texts
    for document in _documents(documents, document_column):
        parts = [document] if isinstance(document, str) else document
        texts = [text for part in parts for text in split(part)]
        counts["documents"] += 1
        counts["empty"] += not texts
        counts["without next"] += len(texts) == 1 and not keep_last
        if max_characters is not None:
            texts = [cut(text, max_characters) for text in texts]
        for text, following in zip(texts, texts[1:] + [""] * keep_last, strict=False):
            if (key := hash((text, following))) in seen:
                counts["duplicates"] += 1
                continue
            seen.add(key)
            counts["rows"] += 1
            if stop_words is None:
                yield {"text": text, "next": following}
            else:
                target = _content_words(text, stop_words)
                yield {"text": text, "next": _content_words(following, stop_words), "target": target}
    if not counts["rows"]:
        raise ValueError(
            f"No text has a next one: of {counts['documents']} documents, {counts['empty']} are empty and "
            f"{counts['without next']} have one text only. Split more finely: split=sentences, or windows(500); "
            "or for MNTP take single texts too: keep_last=True."
        )
    kinds = {"empty": "empty documents", "without next": "documents of one text", "duplicates": "duplicate rows"}
    removed = [f"{counts[name]:,} {kind}" for name, kind in kinds.items() if counts[name]]
    if removed:
        logger.warning(
            f"{counts['rows']:,} rows were made of {counts['documents']:,} documents. Left out: {', '.join(removed)}."
        )


def _documents(documents: Iterable[Any], document_column: str | None) -> Iterator[str | Sequence[str]]:
    """The documents one by one, each a text or its texts in order."""
    if document_column is not None:
        for _, rows in groupby(documents, key=lambda row: row[document_column]):
            yield [row["text"] or "" for row in rows]
    elif isinstance(documents, (Dataset, IterableDataset)):
        yield from (row["text"] or "" for row in documents)
    else:
        yield from documents


def _content_words(text: str, stop_words: frozenset[str]) -> str:
    return " ".join(word for word in WORD.findall(text) if word.lower() not in stop_words)
