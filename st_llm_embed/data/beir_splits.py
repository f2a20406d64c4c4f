"""Pairs of queries and documents to a retrieval set in BEIR's layout, with queries held back for development and test.

Out: ``corpus.jsonl`` of all documents, ``queries.jsonl``, and ``qrels/{train,dev,test}.tsv``: what ``from_beir``
trains on and what ``evaluate`` takes. Spellings of one text are one; all rows of a query are in one split.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path

from datasets import Dataset

from st_llm_embed.files import check_empty, written_beside

from .columns import check_contrastive_columns
from .normal_form import normal_form


def write_beir_splits(
    rows: Dataset, folder: str | Path, *, dev: float = 0.1, test: float = 0.1, seed: int = 0
) -> dict[str, int]:
    """Write the set.

    Args:
        rows: the pairs, with the columns ``anchor`` and ``positive``, and perhaps ``title``, that of the positive.
            They are held in memory.
        folder: the folder to write; must not exist, or be empty.
        dev, test: the shares of the queries that are held back, drawn at random; 0 for none.
        seed: the seed of the draw.

    Returns:
        The number of queries of each split.

    Raises:
        ValueError: for other columns, empty texts, or shares that leave a split without queries.
        OSError: if the folder cannot be written.
    """
    folder = Path(folder).resolve()
    check_empty(folder)
    if dev < 0 or test < 0 or dev + test >= 1:
        raise ValueError(f"dev={dev} and test={test} must be shares of the queries, and leave some to train on.")
    columns = [name for name in ("anchor", "positive", "title") if name in rows.column_names]
    check_contrastive_columns(rows.select_columns(columns[:2] if len(columns) > 1 else rows.column_names), "rows")
    queries: dict[str, str] = {}
    documents: dict[str, dict[str, str]] = {}
    relevant: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows.select_columns(columns):
        query, document = normal_form(row["anchor"]), normal_form(row["positive"])
        queries.setdefault(query, row["anchor"])
        document_id = f"d{len(documents)}"
        text = {"_id": document_id, "title": row.get("title") or "", "text": row["positive"]}
        relevant[query][documents.setdefault(document, text)["_id"]] = None
    drawn = list(queries)
    random.Random(seed).shuffle(drawn)
    held_back = {"dev": round(dev * len(drawn)), "test": round(test * len(drawn))}
    splits = {"dev": drawn[: held_back["dev"]], "test": drawn[len(drawn) - held_back["test"] :]}
    splits["train"] = drawn[held_back["dev"] : len(drawn) - held_back["test"]]
    for name, share in {"dev": dev, "test": test, "train": 1}.items():
        if share and not splits[name]:
            raise ValueError(
                f"{len(drawn)} queries leave none for {name}. Hold back another share, or give more rows."
            )
    query_ids = {query: f"q{number}" for number, query in enumerate(queries)}
    with written_beside(folder) as staged:
        (staged / "qrels").mkdir(parents=True)
        _write_lines(staged / "corpus.jsonl", [*documents.values()])
        _write_lines(staged / "queries.jsonl", [{"_id": query_ids[q], "text": text} for q, text in queries.items()])
        for name, own in splits.items():
            if own:
                judged = [
                    f"{query_ids[query]}\t{document}\t1" for query in sorted(own) for document in relevant[query]
                ]
                table = "\n".join(["query-id\tcorpus-id\tscore", *judged, ""])
                (staged / "qrels" / f"{name}.tsv").write_text(table, encoding="utf-8")
    return {name: len(splits[name]) for name in ("train", "dev", "test")}


def _write_lines(file: Path, lines: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.write_text(text, encoding="utf-8")
