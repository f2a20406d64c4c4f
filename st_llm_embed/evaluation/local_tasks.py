"""Data sets in folders as real mteb tasks, so that evaluation needs no network.

JSON lines, plain or ``.gz``, in one of these layouts:

- retrieval, as BEIR (arXiv 2104.08663): ``corpus.jsonl``, ``queries.jsonl``, ``qrels/SPLIT.tsv``
- STS: ``SPLIT.jsonl`` with ``sentence1``, ``sentence2``, ``score``
- pair classification: ``SPLIT.jsonl`` with ``sentence1``, ``sentence2``, ``label``, 1 for pairs that belong together
- classification: ``train.jsonl`` and ``SPLIT.jsonl`` with ``text``, ``label``
- clustering: ``SPLIT.jsonl`` with ``text``, ``label``, and no ``train.jsonl``
"""

from __future__ import annotations

import logging
from collections import Counter
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

from st_llm_embed.data.beir import judgements_file, read_qrels
from st_llm_embed.data.sources import plain_or_gz, read_json_lines
from st_llm_embed.hub.folders import hash_files

logger = logging.getLogger(__name__)
LAYOUTS = (
    "corpus.jsonl, queries.jsonl and qrels (retrieval); sentence1, sentence2 and score (STS) or label (pair "
    "classification); text, label (classification with a train.jsonl, else clustering)"
)


def local_task(folder: str | Path, split: str = "test") -> AbsTask:
    """The mteb task of a data set in a folder; its name is the folder's.

    Args:
        folder: in one of the layouts above.
        split: to evaluate on.

    Raises:
        FileNotFoundError: if the folder or the split is not there.
        ValueError: for another layout, naming the columns found.
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
        folder: of the data.
        split: to evaluate on.

    Attributes:
        counts: what was left out of the data, by reason.
    """

    kind: str
    main_score: str
    splits: tuple[str, ...] = ()  # read besides

    def __init__(self, folder: Path, split: str = "test") -> None:
        self.folder, self.split, self.counts = folder, split, Counter()
        self.metadata = TaskMetadata(
            name=folder.resolve().name,
            description=f"{split} of {folder}",
            # Results on other data are not taken for these.
            dataset={"path": str(folder), "revision": hash_files(folder, self._files())},
            type=self.kind,
            category="t2t" if self.kind in ("Retrieval", "STS", "PairClassification") else "t2c",
            eval_splits=[split],
            eval_langs=["eng-Latn"],  # mteb asks for one; of its models only BM25 reads it
            main_score=self.main_score,
        )
        super().__init__()

    def _files(self) -> list[Path]:
        return [_split_file(self.folder, split) for split in (*self.splits, self.split)]

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Read the files; mteb's arguments are about its downloads."""
        if not self.data_loaded:
            self.dataset = {"default": self._read()}
            self.data_loaded = True

    def unload_data(self) -> None:
        """Free the data. mteb's own would take ``metadata`` for a change to a class attribute, and drop it too."""
        self.dataset, self.data_loaded = None, False

    def _read(self) -> DatasetDict:
        return DatasetDict({split: _read_split(self.folder, split) for split in (*self.splits, self.split)})


class LocalRetrieval(LocalTask, AbsTaskRetrieval):
    """A retrieval set in BEIR's layout, with graded judgements.

    Judgements of documents or queries that are not in the files are left out and counted, and so are queries without
    a relevant document.
    """

    kind = "Retrieval"
    main_score = "ndcg_at_10"

    def _files(self) -> list[Path]:
        texts = [plain_or_gz(self.folder / name) for name in ("corpus.jsonl", "queries.jsonl")]
        return [*texts, judgements_file(self.folder, self.split)]

    def _read(self) -> dict[str, Any]:
        corpus_file, query_file, qrels = self._files()
        corpus = [
            {"id": str(row["_id"]), "title": row.get("title") or "", "text": row["text"]}
            for _, row in read_json_lines(corpus_file)
        ]
        queries = {str(row["_id"]): row["text"] for _, row in read_json_lines(query_file)}
        documents = {row["id"] for row in corpus}
        judged: dict[str, dict[str, int]] = {}
        self.counts.clear()
        for query, document, score in read_qrels(qrels):
            if score != int(score):
                raise ValueError(f"{qrels} grades {document!r} for {query!r} by {score}. Grades are whole numbers.")
            self.counts["judgements of missing documents"] += (absent := document not in documents)
            self.counts["judgements of missing queries"] += query not in queries
            if not absent and query in queries:
                judged.setdefault(query, {})[document] = int(score)
        relevant = {query: grades for query, grades in judged.items() if max(grades.values()) > 0}
        self.counts["queries without a relevant document"] = len(judged) - len(relevant)
        if not relevant:
            raise ValueError(f"{qrels} names no query and document that are both in {self.folder}.")
        if left_out := {why: count for why, count in self.counts.items() if count}:
            logger.warning("%s: left out are %s.", qrels, left_out)
        asked = [{"id": query, "text": queries[query]} for query in relevant]
        return {
            self.split: {
                "corpus": Dataset.from_list(corpus),
                "queries": Dataset.from_list(asked),
                "relevant_docs": relevant,
                "top_ranked": None,
            }
        }


class LocalSTS(LocalTask, AbsTaskSTS):
    """Spearman's correlation of cosine with the scores; any scale of scores will do."""

    kind = "STS"
    main_score = "cosine_spearman"


class LocalPairClassification(LocalTask, AbsTaskPairClassification):
    """Average precision of cosine at telling the pairs labelled 1 from those labelled 0."""

    kind = "PairClassification"
    main_score = "max_ap"
    label_column_name = "label"

    def _read(self) -> DatasetDict:
        dataset = super()._read()
        if set(labels := dataset[self.split].unique("label")) != {0, 1}:
            raise ValueError(
                f"{self.folder} labels its pairs {sorted(labels, key=str)[:5]}. Labels are 1 for pairs that belong "
                "together, else 0."
            )
        return dataset


class LocalClassification(LocalTask, AbsTaskClassification):
    """Accuracy of mteb's logistic regressions on a few texts of each class of ``train``."""

    kind = "Classification"
    main_score = "accuracy"
    splits = ("train",)


class LocalClustering(LocalTask, AbsTaskClustering):
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
        there = sorted(file.name for file in folder.glob("*.jsonl*"))
        raise FileNotFoundError(f"{error} Files of {folder}: {', '.join(there) or 'none'}.") from error


def _read_split(folder: Path, split: str) -> Dataset:
    return Dataset.from_list([row for _, row in read_json_lines(_split_file(folder, split))])
