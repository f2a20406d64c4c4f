"""What mining hard negatives costs, next to sentence-transformers' ``mine_hard_negatives`` with the same settings.

    python -m examples.benchmarks.mining

1,000 lines of Python's own library ask for the line after them, among 100,000 lines. The teacher averages a random
vector of 384 numbers for each word: encoding is nearly free, so what is measured is the mining. Each run is a new
process; they take turns, and must find the same negatives. Time is that of the processor, all threads together; memory
is the process's peak (Linux) beyond what it held before.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import mine_hard_negatives
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from st_llm_embed.mining.negatives import mine_negatives

SETTINGS = {"num_negatives": 7, "relative_margin": 0.05, "range_max": 100}
AT_ONCE = {"stock": {"batch_size": 512}, "here": {"tokens_per_batch": 8192}}
FORMS = ("stock", "here", "here, FAISS", "here, cached")


def write_data(folder: Path, documents: int = 100_000, anchors: int = 1000) -> None:
    """The data set, the corpus and the teacher."""
    splitter = Whitespace()
    lines: dict[tuple[str, ...], str] = {}  # by their words: the same in another order would tie
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in file.parts and len(lines) < documents:
            text = file.read_text(encoding="utf-8", errors="replace")
            for line in text.splitlines():
                if len(line.split()) > 3:
                    words = sorted(word for word, _ in splitter.pre_tokenize_str(line))
                    lines.setdefault(tuple(words), " ".join(line.split()))
    corpus = list(dict.fromkeys(lines.values()))[:documents]
    step = len(corpus) // anchors
    rows = {"anchor": corpus[::step][:anchors], "positive": corpus[1::step][:anchors]}
    asked = set(rows["anchor"])  # which stock would take for negatives
    Dataset.from_dict({"text": [line for line in corpus if line not in asked]}).save_to_disk(folder / "corpus")
    Dataset.from_dict(rows).save_to_disk(folder / "rows")
    words = dict.fromkeys(word for line in corpus for word, _ in splitter.pre_tokenize_str(line))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = splitter
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=384)]).save_pretrained(
        str(folder / "teacher")
    )


def run(form: str, folder: Path) -> None:
    """One run, in this process: print its seconds, megabytes and rows."""
    rows, corpus = Dataset.load_from_disk(folder / "rows"), Dataset.load_from_disk(folder / "corpus")
    teacher = SentenceTransformer(str(folder / "teacher"), device="cpu")
    teacher.encode(["a line"])
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, started = peak_megabytes(), time.process_time()
    if form == "stock":
        texts = corpus["text"][:]
        stock = {"output_format": "n-tuple", "verbose": False, **AT_ONCE["stock"]}
        mined = mine_hard_negatives(rows, teacher, corpus=texts, **stock, **SETTINGS)
    else:
        cache = {"cache_folder": folder / "cache"} if form == "here, cached" else {}
        use_faiss = "exact" if form == "here, FAISS" else None
        settings = {**cache, **AT_ONCE["here"], **SETTINGS}
        mined = mine_negatives(rows, teacher, corpus, use_faiss=use_faiss, **settings).rows
    seconds, megabytes = time.process_time() - started, peak_megabytes() - before
    print(json.dumps({"seconds": seconds, "megabytes": megabytes, "rows": mined.to_list()}))


def peak_megabytes() -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def main(rounds: int = 3) -> None:
    """Print one table of medians."""
    with tempfile.TemporaryDirectory() as temporary:
        write_data(Path(temporary))
        forms = [form for form in FORMS if form != "here, FAISS" or has_faiss()]
        results: dict[str, list[dict]] = {form: [] for form in forms}
        for turn in range(rounds + 1):
            for form in forms if turn % 2 else reversed(forms):
                command = [sys.executable, __file__, form, temporary]
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
                )
                results[form].append(json.loads(done.stdout.splitlines()[-1]))
        expected = {(row["anchor"], row["positive"]): row for row in results["stock"][0]["rows"]}
        print("| | CPU seconds | of stock's time | MB |\n| --- | --- | --- | --- |")
        for form, runs in results.items():
            assert {(row["anchor"], row["positive"]): row for row in runs[0]["rows"]} == expected, form
            runs = runs[1:]  # the first fills the cache
            ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs, results["stock"][1:], strict=True)]
            seconds, megabytes = (statistics.median(run[key] for run in runs) for key in ("seconds", "megabytes"))
            print(f"| {form} | {seconds:.1f} | {statistics.median(ratios):.2f} | {megabytes:.0f} |")


def has_faiss() -> bool:
    return subprocess.run([sys.executable, "-c", "import faiss"], stderr=subprocess.DEVNULL).returncode == 0


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2])) if len(sys.argv) > 2 else main()
