"""A retrieval set in BEIR's layout (arXiv 2104.08663) to rows: corpus and queries in JSON lines, judgements in qrels.

``corpus.jsonl`` {_id, title, text} and ``queries.jsonl`` {_id, text}, plain or ``.gz``; ``qrels/SPLIT.tsv`` of query,
document and score, plain or ``.gz`` too. The corpus is read once, and of it only the judged documents are held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import isfinite, nan
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, IterableDataset

from .rows import Judged, contrastive_dataset
from .sources import joined, text_or_empty
from .text_files import plain_or_gz, read_json_lines, read_lines


def from_beir(
    folder: str | Path,
    *,
    split: str = "train",
    min_score: float = 1,
    negatives: int = 0,
    seed: int = 0,
    drop_short: bool = False,
    streaming: bool = False,
    counts: Counter[str] | None = None,
) -> Dataset | IterableDataset:
    """Each query of a split with each of its relevant documents.

    Args:
        folder: the folder of the data set, in BEIR's layout.
        split: the split, which names the file of judgements: ``qrels/{split}.tsv``.
        min_score: the lowest score that makes a document relevant.
        negatives: how many of the documents judged 0 or less each row gets as hard negatives. Documents with scores
            in between are neither positives nor negatives.
        seed, drop_short, streaming, counts: see ``contrastive_dataset``. Counted besides: ``missing queries`` and
            ``missing documents``, judged but not in the files, and judgements ``below min_score``, but above 0.

    Raises:
        FileNotFoundError: naming the file that is not there, and the splits that are.
        ValueError: naming the file and the line that cannot be read; see also ``contrastive_dataset``.
    """
    root = Path(folder)
    qrels = judgements_file(root, split)
    corpus, queries = (plain_or_gz(root / name) for name in ("corpus.jsonl", "queries.jsonl"))

    def judged(counted: Counter[str]) -> Iterator[Judged]:
        relevant, rejected = relevant_documents(qrels, min_score, counted)
        needed = {document for documents in relevant.values() for document in documents}
        if negatives:
            needed.update(document for query in relevant for document in rejected.get(query, ()))
        document_texts: dict[str, str] = {}
        for line in read_texts(corpus):
            if line.id in needed:
                check_one_text(corpus, line.id, document_texts.setdefault(line.id, line.document), line.document)
        query_texts: dict[str, str] = {}
        for line in read_texts(queries):
            if line.id in relevant:
                check_one_text(queries, line.id, query_texts.setdefault(line.id, line.text), line.text)
        for query, documents in relevant.items():
            hard_negatives = rejected.get(query, []) if negatives else []
            counted["missing documents"] += sum(name not in document_texts for name in (*documents, *hard_negatives))
            if query not in query_texts:
                counted["missing queries"] += 1
                continue
            positive_texts, negative_texts = (
                [document_texts[name] for name in names if name in document_texts]
                for names in (documents, hard_negatives)
            )
            yield Judged(f"Query {query!r} of {qrels}", query_texts[query], positive_texts, negative_texts)

    return contrastive_dataset(
        judged, negatives=negatives, seed=seed, drop_short=drop_short, streaming=streaming, counts=counts
    )


def judgements_file(root: Path, split: str) -> Path:
    """The judgements of a split.

    Raises:
        FileNotFoundError: naming the splits that are there.
    """
    try:
        return plain_or_gz(root / "qrels" / f"{split}.tsv")
    except FileNotFoundError as error:
        splits = sorted({file.name.partition(".tsv")[0] for file in root.glob("qrels/*.tsv*")})
        raise FileNotFoundError(f"{error} Splits of {root}: {', '.join(splits) or 'none'}.") from error


class TextLine(NamedTuple):
    """A line of a corpus or query file."""

    id: str
    title: str  # "" for none
    text: str

    @property
    def document(self) -> str:
        """What is embedded of a document; of a query it is the text."""
        return joined(self.title, self.text)


def read_texts(file: str | Path) -> Iterator[TextLine]:
    """The lines of ``corpus.jsonl`` or ``queries.jsonl``.

    Raises:
        ValueError: naming the file and the line without id or text, or with another value in their place.
    """
    for where, row in read_json_lines(file):
        if "_id" not in row or "text" not in row:
            raise ValueError(f"{where} has the keys {list(row)}. BEIR's lines need '_id' and 'text'.")
        if not isinstance(row["_id"], str | int):
            raise ValueError(f"{where} has the '_id' {row['_id']!r}. Ids are text or whole numbers.")
        yield TextLine(str(row["_id"]), *(text_or_empty(row.get(part), where) for part in ("title", "text")))


def check_one_text(file: Path, name: str, first_text: str | None, text: str) -> None:
    """Check that an id has one text. mteb and BEIR take the last of several: figures for a set that nobody meant.

    Raises:
        ValueError: naming the id and both texts.
    """
    if first_text is not None and first_text != text:
        raise ValueError(
            f"{file} has the id {name!r} for two texts, {first_text[:60]!r} and {text[:60]!r}. Fix: leave one of "
            "them out."
        )


def read_qrels(file: str | Path) -> Iterator[tuple[str, str, float]]:
    """Each judgement: the query's id, the document's id, the score.

    Lines are ``query document score`` with tabs (BEIR) or ``query 0 document score`` (TREC), below a header or none.

    Raises:
        ValueError: naming the file and the line that has neither form.
    """
    for place, (number, line) in enumerate(read_lines(file)):
        fields = line.split("\t") if "\t" in line else line.split()
        try:
            score = float(fields[-1])
        except ValueError:
            if place == 0 and len(fields) in (3, 4):  # the header
                continue
            score = nan
        if len(fields) not in (3, 4) or not isfinite(score):
            raise ValueError(
                f"Line {number} of {file} is neither 'query document score' nor 'query 0 document score': "
                f"{line[:80]!r}"
            )
        yield fields[0], fields[-2], score


def relevant_documents(
    qrels: str | Path, min_score: float, counts: Counter[str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The ids of each query's relevant documents (``min_score`` or more), and of its rejected ones (0 or less)."""
    relevant: dict[str, list[str]] = {}
    rejected: dict[str, list[str]] = {}
    for query, document, score in read_qrels(qrels):
        if score >= min_score:
            relevant.setdefault(query, []).append(document)
        elif score <= 0:
            rejected.setdefault(query, []).append(document)
        else:
            counts["below min_score"] += 1
    return relevant, rejected
