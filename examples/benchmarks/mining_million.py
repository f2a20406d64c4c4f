"""What mining over a million texts costs, alone, shared by workers, and approximately; and sentence-transformers'.

    python -m examples.benchmarks.mining_million --texts 50000 1000000 --workers 2

The rows ask for texts of ten words of 5,000, by six of them; the teacher is a bag of words of 384 dimensions:
encoding is nearly free, so what is measured is the mining. Words are drawn at random, so that no cluster holds texts
alike: the worst case of an approximate search. Each run is made of new processes and an empty folder. Time is that of
the clock from the first text to the last negative; memory is the largest process's peak (Linux) beyond what it held
before, and vectors on disk count while they are read. ``mine_hard_negatives`` holds all texts and vectors in memory:
it runs up to ``--stock-up-to`` texts, and must find the same negatives.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import mine_hard_negatives
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from examples.benchmarks.mining import has_faiss, peak_megabytes
from st_llm_embed.mining import mine_negatives

SETTINGS = {"num_negatives": 7, "relative_margin": 0.05, "range_max": 100}
WORDS, DIM = 5000, 384


def texts(count: int) -> Iterator[dict[str, str]]:
    """``count`` rows of ten words."""
    draw = np.random.default_rng(0)
    for _ in range(count):
        yield {"text": " ".join(f"word{i}" for i in draw.integers(WORDS, size=10))}


def prepare(folder: Path, count: int, rows: int) -> None:
    """The rows, the corpus and the teacher."""
    corpus = Dataset.from_generator(texts, gen_kwargs={"count": count}, cache_dir=str(folder / "made"))
    corpus.save_to_disk(folder / "corpus")
    positives = corpus[:: max(1, count // rows)]["text"][:rows]
    anchors = [" ".join(text.split()[:6]) for text in positives]
    Dataset.from_dict({"anchor": anchors, "positive": positives}).save_to_disk(folder / "rows")
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *(f"word{i}" for i in range(WORDS))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    bag = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=DIM)])
    bag.save_pretrained(str(folder / "teacher"))


def run(form: str, folder: Path) -> None:
    """One process of a run: print when it began and ended, its megabytes and its negatives."""
    rows, corpus = Dataset.load_from_disk(folder / "rows"), Dataset.load_from_disk(folder / "corpus")
    teacher = SentenceTransformer(str(folder / "teacher"), device="cpu")
    teacher.encode(["a line"])
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, started, recall = peak_megabytes(), time.time(), None
    if form == "stock":
        given = corpus["text"][:]
        stock = {"output_format": "n-tuple", "batch_size": 512, "verbose": False}
        mined = mine_hard_negatives(rows, teacher, corpus=given, **stock, **SETTINGS)
    else:
        use_faiss = "approximate" if form == "approximate" else None
        cache = folder / "cache"
        found = mine_negatives(
            rows, teacher, corpus, use_faiss=use_faiss, cache_folder=cache, tokens_per_batch=8192, **SETTINGS
        )
        mined, recall = found.rows, found.report.recall
    ended, megabytes = time.time(), peak_megabytes() - before
    negatives = {row.pop("anchor"): row for row in mined.to_list()}
    result = {"started": started, "ended": ended, "megabytes": megabytes, "recall": recall, "negatives": negatives}
    print(json.dumps(result))


def measure(form: str, workers: int, folder: Path) -> tuple[str, dict]:
    """A run of some processes at once: what to say of it, and its negatives."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    command = [sys.executable, "-m", "examples.benchmarks.mining_million", "--form", form, "--folder", str(folder)]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    running = [subprocess.Popen(command, stdout=pipe, stderr=null, text=True) for _ in range(workers)]
    results = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    assert all(result["negatives"] == results[0]["negatives"] for result in results)
    seconds = max(result["ended"] for result in results) - min(result["started"] for result in results)
    recall = "" if results[0]["recall"] is None else f"{results[0]['recall']:.3f}"
    return f"{seconds:.0f} | {max(result['megabytes'] for result in results):.0f} | {recall}", results[0]["negatives"]


def main() -> None:
    """Print one table for all numbers of texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, nargs="+", default=[50_000, 1_000_000], help="numbers of texts")
    parser.add_argument(
        "--rows", type=int, default=1000, help="the number of rows; of 10,240 each, workers share them"
    )
    parser.add_argument("--stock-up-to", type=int, default=50_000, help="the most texts for sentence-transformers'")
    parser.add_argument("--workers", type=int, default=1, help="how many processes share a run, besides one alone")
    parser.add_argument("--form", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.form:
        run(arguments.form, arguments.folder)
        return
    print("| texts | | seconds | MB | recall |\n| --- | --- | --- | --- | --- |")
    for count in arguments.texts:
        with tempfile.TemporaryDirectory() as scratch:
            prepare(Path(scratch), count, arguments.rows)
            forms = [("here", 1)] + [("here", arguments.workers)] * (arguments.workers > 1)
            forms += [("approximate", 1)] * has_faiss() + [("stock", 1)] * (count <= arguments.stock_up_to)
            expected = None
            for form, workers in forms:
                said, negatives = measure(form, workers, Path(scratch))
                print(f"| {count:,} | {form}, {workers} process{'es' * (workers > 1)} | {said} |", flush=True)
                expected = expected or negatives
                assert form == "approximate" or negatives == expected, form


if __name__ == "__main__":
    main()
