"""What a million texts of a teacher's vectors cost in memory: the peak of training on them, and of a few of them.

    python -m examples.benchmarks.teacher_memory --texts 10000 1000000

The texts are short and different, the teacher a bag of words of 384 dimensions, the student two layers of random
weights: what is measured is what the texts and vectors take. The encoding is killed halfway and started again; what is
there by then is not written anew. Prints the peak of the resident memory, and of that which is no file's, of a process
that trains for 30 steps, for each number of texts.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from transformers import LlamaConfig, LlamaModel

from examples.demo.llm import bundled_llm
from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, Task, build_model
from st_llm_embed.teaching import Teacher

STEPS, DIM = 30, 384
READ = Task("read", kind="documents")


def save_texts(folder: Path, count: int) -> None:
    """Short texts, each another, as a data set in ``folder/texts``."""
    rows = Dataset.from_generator(
        lambda: ({"text": f"text {i} of {i * 7919 % 104729} and {i * 31 % 997}"} for i in range(count)),
        cache_dir=str(folder / "cache"),
    )
    rows.save_to_disk(str(folder / "texts"))


def prepare(folder: Path, count: int) -> None:
    """The texts, the teacher and the student."""
    torch.manual_seed(0)
    save_texts(folder, count)
    tokenizer = build_model(bundled_llm(), "mean", num_layers=1).tokenizer
    bag = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=DIM), Normalize()])
    bag.save_pretrained(str(folder / "teacher"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=DIM,
        intermediate_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=6,
        tie_word_embeddings=True,
    )
    LlamaModel(config).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")


def work(folder: Path, trains: bool) -> None:
    """Encode, or train on what is encoded and print the peak."""
    rows = Dataset.load_from_disk(str(folder / "texts"))
    teacher = Teacher(SentenceTransformer(str(folder / "teacher")), folder / "vectors", tokens_per_batch=8192)
    if not trains:
        teacher.encode(rows, READ)
        return
    model = build_model(folder / "student", "mean", max_seq_length=32)
    args = LLMEmbedTrainingArguments(
        str(folder / "run"), max_steps=STEPS, per_device_train_batch_size=64, use_cpu=True, save_strategy="no"
    )
    args.report_to, args.disable_tqdm = [], True
    LLMEmbedTrainer(model, args, {"read": rows}, tasks=[READ], teacher=teacher).train()
    status = Path("/proc/self/status").read_text()
    peak, own = (int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 1024 for key in ("VmHWM", "RssAnon"))
    print(f"peak {peak:.0f} MB resident; {own:.0f} MB at the end that are no file's")


def measure(count: int) -> None:
    """One number of texts, in processes of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, count)
        command = [sys.executable, "-m", "examples.benchmarks.teacher_memory", "--folder", scratch]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        shards = -(-count // 10_000)
        while process.poll() is None and len(list((folder / "vectors").rglob("*.npy"))) < max(1, shards // 2):
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = {file: file.stat().st_mtime_ns for file in (folder / "vectors").rglob("*.npy")}
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        kept = sum(file.stat().st_mtime_ns == written for file, written in before.items())
        print(f"{count:,} texts: killed after {len(before)} of {shards} shards, of which {kept} were kept")
        done = subprocess.run([*command, "--trains"], check=True, capture_output=True, text=True, env={**os.environ})
        print(f"{count:,} texts: {done.stdout.splitlines()[-1]}", flush=True)


def main() -> None:
    """Measure each number of texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, nargs="+", default=[10_000, 1_000_000], help="numbers of texts")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trains", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        work(arguments.folder, arguments.trains)
        return
    for count in arguments.texts:
        measure(count)


if __name__ == "__main__":
    main()
