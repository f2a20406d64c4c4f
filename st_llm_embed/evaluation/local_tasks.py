"""Data sets in folders as real mteb tasks, so that evaluation needs no network.

JSON lines, plain or ``.gz``, in one of these layouts:

- retrieval, as BEIR (arXiv 2104.08663): ``corpus.jsonl``, ``queries.jsonl``, ``qrels/SPLIT.tsv``
- STS: ``SPLIT.jsonl`` with ``sentence1``, ``sentence2``, ``score``
- pair classification: ``SPLIT.jsonl`` with ``sentence1``, ``sentence2``, ``label``, 1 for pairs that belong together
- classification: ``train.jsonl`` and ``SPLIT.jsonl`` with ``text``, ``label``
- clustering: ``SPLIT.jsonl`` with ``text``, ``label``, and no ``train.jsonl``

The scores are those that mteb gives for the same data on the Hub.
"""

from __future__ import annotations

import logging
from collections import Counter
from math import isfinite
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata

from st_llm_embed.data.beir import check_one_text, judgements_file, read_qrels, read_texts
from st_llm_embed.data.normal_form import normal_form
from st_llm_embed.data.text_files import plain_or_gz, read_json_lines
from st_llm_embed.files import hash_files
from st_llm_embed.version import __version__

logger = logging.getLogger(__name__)
LAYOUTS = (
    "corpus.jsonl, queries.jsonl and qrels (retrieval); sentence1, sentence2 and score (STS) or label (pair "
    "classification); text, label (classification with a train.jsonl, else clustering)"
)


def local_task(folder: str | Path, split: str = "test") -> AbsTask:
    """The mteb task of a data set in a folder; its name is the folder's.

    Args:
        folder: the folder of the data set, in one of the layouts above.
        split: the split to evaluate on.

    Raises:
        FileNotFoundError: if the folder or the split is not there.
        ValueError: for another layout, naming the columns of its first line.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder.")
    if (root / "qrels").is_dir():
        return LocalRetrieval(root, split)
    where, first = next(read_json_lines(_split_file(root, split)), (f"{root}'s {split}", {}))
    if {"sentence1", "sentence2", "score"} <= first.keys():
        return LocalSTS(root, split)
    if {"sentence1", "sentence2", "label"} <= first.keys():
        return LocalPairClassification(root, split)
    if {"text", "label"} <= first.keys():
        trainable = any((root / f"train.jsonl{suffix}").is_file() for suffix in ("", ".gz"))
        return LocalClassification(root, split) if trainable else LocalClustering(root, split)
    raise ValueError(f"{where} has the columns {list(first)}. The layouts are: {LAYOUTS}.")


class LocalTask(AbsTask):
    """A task whose data lie in a folder.

    Args:
        folder: the folder of the data set.
        split: the split to evaluate on.

    Attributes:
        counts: how much of the data does not count, or not as one might expect, by reason.
    """

    kind: str
    main_score: str
    other_splits: tuple[str, ...] = ()  # read besides
    counts: Counter[str]
    dataset: dict[str, Any] | None
    data_loaded: bool

    def __init__(self, folder: Path, split: str = "test") -> None:
        self.folder, self.split, self.counts = folder, split, Counter()
        self.metadata = TaskMetadata(
            name=folder.resolve().name,
            description=f"{split} of {folder}",
            # Results on other data, or on these as another version read them, are not taken for these.
            dataset={"path": str(folder), "revision": f"{hash_files(folder, self._files())}-{__version__}"},
            type=self.kind,
            category="t2t" if self.kind in ("Retrieval", "STS", "PairClassification") else "t2c",
            eval_splits=[split],
            eval_langs=["eng-Latn"],  # mteb asks for one; of its models only BM25 reads it
            main_score=self.main_score,
        )
        super().__init__()

    def _files(self) -> list[Path]:
        return [_split_file(self.folder, split) for split in (*self.other_splits, self.split)]

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Read the files; mteb's arguments are about its downloads."""
        if not self.data_loaded:
            self.dataset = {"default": self._read()}
            self.data_loaded = True

    def unload_data(self) -> None:
        """Free the data. mteb's own would take ``metadata`` for a change to a class attribute, and drop it too."""
        self.dataset, self.data_loaded = None, False


class LocalRetrieval(LocalTask, AbsTaskRetrieval):
    """A retrieval set in BEIR's layout, with graded judgements.

    As in mteb and BEIR, a relevant document that is not in the files counts as not found, a query without a relevant
    one as 0, and a line that comes again once; judgements of queries that are not in the files are left out. Where the
    queries are documents of the corpus under the same id (ArguAna, Quora), a query is no answer to itself.
    """

    kind = "Retrieval"
    main_score = "ndcg_at_10"

    def _files(self) -> list[Path]:
        texts = [plain_or_gz(self.folder / name) for name in ("corpus.jsonl", "queries.jsonl")]
        return [*texts, judgements_file(self.folder, self.split)]

    def _read(self) -> dict[str, Any]:
        corpus_file, query_file, qrels = self._files()
        counts: Counter[str] = Counter()
        corpus: dict[str, str] = {}
        queries: dict[str, str] = {}
        documents_too = set()  # the ids of queries that are documents as well
        for line in read_texts(query_file):
            check_one_text(query_file, line.id, queries.get(line.id), line.text)
            counts["queries whose id comes again"] += line.id in queries
            queries[line.id] = line.text
        for line in read_texts(corpus_file):
            check_one_text(corpus_file, line.id, corpus.get(line.id), line.document)
            counts["documents whose id comes again"] += line.id in corpus
            corpus[line.id] = line.document
            spellings = {normal_form(line.text), normal_form(line.document)} if line.id in queries else ()
            if spellings and normal_form(queries[line.id]) in spellings:
                documents_too.add(line.id)
        judged: dict[str, dict[str, int]] = {}
        for query, document, score in read_qrels(qrels):
            if score != int(score):
                raise ValueError(f"{qrels} grades {document!r} for {query!r} by {score}. Grades are whole numbers.")
            counts["judgements of missing documents"] += document not in corpus
            counts["judgements of missing queries"] += query not in queries
            if query in queries:
                # NOTE: pytrec_eval crashes on queries with negative grades alone, which mean what 0 means.
                judged.setdefault(query, {})[document] = max(0, int(score))
        relevant = {
            query: {document for document, grade in grades.items() if grade > 0} for query, grades in judged.items()
        }
        counts["queries without a relevant document"] = sum(not documents for documents in relevant.values())
        if not any(documents & corpus.keys() for documents in relevant.values()):
            raise ValueError(f"{qrels} names no query and relevant document that are both in {self.folder}.")
        # Not where ids mean something else: there a query's relevant document may have its id.
        self.ignore_identical_ids = bool(documents_too) and not any(query in relevant[query] for query in relevant)
        if self.ignore_identical_ids:
            counts["queries that are documents"] = len(documents_too & judged.keys())
        if counts != self.counts and +counts:
            logger.warning("%s: there are %s; see LocalRetrieval for how they count.", qrels, dict(+counts))
        self.counts = counts
        query_rows = [{"id": query, "text": text} for query, text in queries.items() if query in judged]
        return {
            self.split: {
                "corpus": Dataset.from_dict({"id": list(corpus), "text": list(corpus.values())}),
                "queries": Dataset.from_list(query_rows),
                "relevant_docs": judged,
                "top_ranked": None,
            }
        }


class TableTask(LocalTask):
    """A task of one table for each split: columns of text, and one of judgements."""

    texts: tuple[str, ...]
    judged: str
    valid: str  # which judgements are valid, in a sentence for errors

    def _read(self) -> DatasetDict:
        tables = {split: self._rows(split) for split in (*self.other_splits, self.split)}
        self._check({split: [row[self.judged] for row in rows] for split, rows in tables.items()})
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in tables.items()})

    def _rows(self, split: str) -> list[dict[str, Any]]:
        """The columns that the task reads.

        Raises:
            ValueError: naming the line with something else where text or a judgement is expected.
        """
        rows = []
        for where, row in read_json_lines(_split_file(self.folder, split)):
            for column in self.texts:
                if not isinstance(row.get(column), str):
                    raise ValueError(f"{where} has {row.get(column)!r} in {column!r}, where text is expected.")
            if not self._judges(row.get(self.judged)):
                raise ValueError(f"{where} has {row.get(self.judged)!r} in {self.judged!r}. {self.valid}")
            rows.append({column: row[column] for column in (*self.texts, self.judged)})
        return rows

    def _judges(self, value: Any) -> bool:
        raise NotImplementedError

    def _check(self, judgements: dict[str, list[Any]]) -> None:
        """Refuse a split on which there is no score."""
        self._check_two(self.split, judgements[self.split])

    def _check_two(self, split: str, values: list[Any]) -> None:
        if len(distinct := set(values)) < 2:
            raise ValueError(
                f"{_split_file(self.folder, split)} has {list(distinct)} alone in {self.judged!r}: there is nothing "
                f"to tell apart. {self.valid}"
            )


class LocalSTS(TableTask, AbsTaskSTS):
    """Spearman's correlation of cosine with the scores; any scale of scores will do."""

    kind = "STS"
    main_score = "cosine_spearman"
    texts = ("sentence1", "sentence2")
    judged = "score"
    valid = "Scores are numbers, at least two different ones, on any scale."

    def _judges(self, value: Any) -> bool:
        return isinstance(value, int | float) and isfinite(value)


class LocalPairClassification(TableTask, AbsTaskPairClassification):
    """Average precision of cosine at telling the pairs labelled 1 from those labelled 0."""

    kind = "PairClassification"
    main_score = "max_ap"
    label_column_name = "label"
    texts = ("sentence1", "sentence2")
    judged = "label"
    valid = "Labels are 1 for pairs that belong together, else 0, and there must be both."

    def _judges(self, value: Any) -> bool:
        return value in (0, 1)


class ClassTask(TableTask):
    """A task of texts and their classes."""

    texts = ("text",)
    judged = "label"
    valid = "Labels are text or numbers, one for each text, and all of one sort."

    def _judges(self, value: Any) -> bool:
        return isinstance(value, str | int | float)

    def _check(self, judgements: dict[str, list[Any]]) -> None:
        if len({isinstance(label, str) for labels in judgements.values() for label in labels}) > 1:
            raise ValueError(f"{self.folder} has labels of text and of numbers. {self.valid}")


class LocalClassification(ClassTask, AbsTaskClassification):
    """Accuracy of mteb's logistic regressions on a few texts of each class of ``train``."""

    kind = "Classification"
    main_score = "accuracy"
    other_splits = ("train",)

    def _check(self, judgements: dict[str, list[Any]]) -> None:
        super()._check(judgements)
        self._check_two("train", judgements["train"])


class LocalClustering(ClassTask, AbsTaskClustering):
    """V-measure of mteb's k-means."""

    kind = "Clustering"
    main_score = "v_measure"
    max_fraction_of_documents_to_embed = None
    input_column_name = "text"
    label_column_name = "label"


def _split_file(folder: Path, split: str) -> Path:
    try:
        return plain_or_gz(folder / f"{split}.jsonl")
    except FileNotFoundError as error:
        files = sorted(file.name for file in folder.glob("*.jsonl*"))
        raise FileNotFoundError(f"{error} Files of {folder}: {', '.join(files) or 'none'}.") from error
