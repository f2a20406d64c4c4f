"""The files of MS MARCO (arXiv 1611.09268), passages and documents, to rows, in memory that the collection outgrows.

``collection``: lines of id and passage, or of id, url, title and body, with tabs. What is held of it is each line's id
and offset; the texts are read from the disk as rows need them. A ``.gz`` collection cannot be read at an offset, so it
is unpacked into a temporary file first.
"""

from __future__ import annotations

import gzip
import random
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
from datasets import Dataset, IterableDataset

from .beir import relevant_documents
from .rows import Judged, contrastive_dataset
from .sources import joined
from .text_files import is_gz, read_lines, undamaged

IDS_AT_ONCE = 100_000
SPARE = 8  # documents read beyond the negatives asked for: some repeat a positive's text under another id


def from_ms_marco(
    collection: str | Path,
    queries: str | Path,
    qrels: str | Path,
    *,
    run: str | Path | None = None,
    min_score: float = 1,
    negatives: int = 0,
    seed: int = 0,
    drop_short: bool = False,
    streaming: bool = False,
    counts: Counter[str] | None = None,
) -> Dataset | IterableDataset:
    """Each judged query with each of its relevant documents, and negatives out of a retriever's ranking.

    All files may be plain or ``.gz``.

    Args:
        collection: the file of documents, ``collection.tsv`` or ``msmarco-docs.tsv``. Title and body are joined.
        queries: the file of queries, ``queries.train.tsv``: lines of id and text.
        qrels: the file of judgements, ``qrels.train.tsv``, in the form of TREC.
        run: the file of the documents that a retriever ranked for each query, such as ``msmarco-doctrain-top100``:
            lines of query, document and rank, or of TREC's six fields, those of a query together.
        min_score: the lowest score that makes a document relevant.
        negatives: how many of the query's documents in ``run`` that are not relevant each row gets as hard negatives.
        seed, drop_short, streaming, counts: see ``contrastive_dataset``. Counted besides: ``missing queries`` and
            ``missing documents``, those that the other files name but ``queries`` and ``collection`` lack.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for ``negatives`` without ``run`` or the reverse, or naming the file and the line that cannot be
            read; see also ``contrastive_dataset``.
    """
    if (run is None) != (negatives == 0):
        raise ValueError(f"run={str(run)!r} and negatives={negatives}: give both, or neither for pairs.")
    _check_files(collection, queries, qrels, *([] if run is None else [run]))

    def judged(counted: Counter[str]) -> Iterator[Judged]:
        query_texts = dict(_fields(queries, 2))
        relevant, _ = relevant_documents(qrels, min_score, counted)
        rankings = ((query, []) for query in relevant) if run is None else _rankings(run, relevant)
        with Collection(collection) as documents:
            for query, ranking in rankings:
                if query not in query_texts:
                    counted["missing queries"] += 1
                    continue
                candidates = [document for document in ranking if document not in relevant[query]]
                size = min(len(candidates), negatives + SPARE)
                chosen = sorted(random.Random(f"{seed}\n{query}").sample(range(len(candidates)), size))
                positive_texts = documents.texts(relevant[query], counted)
                negative_texts = documents.texts([candidates[i] for i in chosen], counted)
                yield Judged(f"Query {query!r} of {qrels}", query_texts[query], positive_texts, negative_texts)

    return contrastive_dataset(
        judged, negatives=negatives, seed=seed, drop_short=drop_short, streaming=streaming, counts=counts
    )


def from_ms_marco_triples(
    collection: str | Path,
    queries: str | Path,
    triples: str | Path,
    *,
    streaming: bool = False,
    counts: Counter[str] | None = None,
) -> Dataset | IterableDataset:
    """Each line of a file such as ``qidpidtriples.train.full.2.tsv``, of the ids of a query, a relevant passage and
    another one, as a row with one hard negative.

    Args:
        collection, queries: see ``from_ms_marco``.
        triples: the file of triples, plain or ``.gz``: lines of three ids.
        streaming, counts: see ``contrastive_dataset``. Counted besides: ``missing queries`` and ``missing documents``.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: naming the file and the line that cannot be read.
    """
    _check_files(collection, queries, triples)

    def judged(counted: Counter[str]) -> Iterator[Judged]:
        query_texts = dict(_fields(queries, 2))
        with Collection(collection) as documents:
            for query, positive, negative in _fields(triples, 3):
                if query not in query_texts:
                    counted["missing queries"] += 1
                    continue
                positive_texts, negative_texts = (documents.texts([name], counted) for name in (positive, negative))
                yield Judged(f"Query {query!r} of {triples}", query_texts[query], positive_texts, negative_texts)

    # A line whose negative is not there, or is the positive, is no row.
    return contrastive_dataset(judged, negatives=1, drop_short=True, streaming=streaming, counts=counts)


class Collection:
    """The documents of a tab-separated file by id, read from the disk one by one.

    16 bytes in memory for each document of MS MARCO: its id and its line's offset, sorted by id.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = file
        self._handle = _seekable(Path(file))
        offsets, parts, ids = array("q"), [], []
        offset = 0
        for line in self._handle:
            offsets.append(offset)
            ids.append(line.partition(b"\t")[0])
            offset += len(line)
            if len(ids) == IDS_AT_ONCE:
                parts.append(np.array(ids))
                ids.clear()
        all_ids = np.concatenate([*parts, np.array(ids, dtype=bytes)])
        order = np.argsort(all_ids, kind="stable")
        self._ids, self._offsets = all_ids[order], np.frombuffer(offsets, np.int64)[order]

    def __enter__(self) -> Collection:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()

    def texts(self, ids: Iterable[str], counts: Counter[str]) -> list[str]:
        """The documents with these ids; those that are not there are counted.

        Raises:
            ValueError: naming the file and the id of a line that is neither a passage nor a document.
        """
        texts = []
        keys = [document.encode() for document in ids]
        for key, place in zip(keys, np.searchsorted(self._ids, np.array(keys, self._ids.dtype)), strict=True):
            if place == len(self._ids) or self._ids[place] != key:
                counts["missing documents"] += 1
                continue
            self._handle.seek(self._offsets[place])
            fields = self._handle.readline().decode("utf-8").rstrip("\r\n").split("\t")
            if len(fields) not in (2, 4):
                raise ValueError(
                    f"The line of {key.decode()!r} in {self.file} has {len(fields)} fields between tabs. A passage "
                    "has 2 (id, text), a document 4 (id, url, title, body)."
                )
            texts.append(joined("", fields[1]) if len(fields) == 2 else joined(*fields[2:]))
        return texts


def _seekable(file: Path) -> BinaryIO:
    if not is_gz(file):
        return open(file, "rb")
    unpacked = tempfile.TemporaryFile()
    with undamaged(file), gzip.open(file) as packed:
        shutil.copyfileobj(packed, unpacked)
    unpacked.seek(0)
    return unpacked


def _rankings(run: str | Path, relevant: dict[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
    """The ranked documents of each judged query of ``run``, and none for those that it leaves out."""
    ranked_queries = set()
    for query, lines in groupby(_ranked(run), key=lambda line: line[0]):
        if query in ranked_queries:
            raise ValueError(f"{run} returns to query {query!r}. Fix: sort it by query, such as with sort -s -k1,1.")
        ranked_queries.add(query)
        if query in relevant:
            yield query, [document for _, document in lines]
    yield from ((query, []) for query in relevant if query not in ranked_queries)


def _ranked(run: str | Path) -> Iterator[tuple[str, str]]:
    for number, line in read_lines(run):
        fields = line.split()
        if len(fields) not in (3, 6):
            raise ValueError(
                f"Line {number} of {run} is neither 'query document rank' nor TREC's six fields: {line[:80]!r}"
            )
        yield fields[0], fields[1 if len(fields) == 3 else 2]


def _fields(file: str | Path, count: int) -> Iterator[list[str]]:
    for number, line in read_lines(file):
        fields = line.split("\t")
        if len(fields) != count:
            raise ValueError(
                f"Line {number} of {file} has {len(fields)} fields between tabs, not {count}: {line[:80]!r}"
            )
        yield fields


def _check_files(*files: str | Path) -> None:
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file} does not exist.")
