"""A million short texts to vectors: memory and rate from the first shard to the last, and two workers against one.

    python -m examples.benchmarks.encode_million --texts 1000000

The texts are short and different, the model one layer of random weights, 64 wide, with SmolLM2's tokenizer. First one
worker with one thread encodes all of them, and the rate and the resident memory of the first and the last tenth are
printed. Then, in turns, one worker with one thread, one with two, and two with one each encode the first shards; the
ratios are of the seconds from the first shard begun to the last one there, and all must leave the same bytes.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaModel

from examples.benchmarks.teacher_memory import save_texts
from examples.demo.llm import bundled_llm
from st_llm_embed import build_model
from st_llm_embed.encoding import CorpusEncoding, ModelEncoder
from st_llm_embed.trust import load_trusted

SHARD = 10_000
PAIR_SHARDS, TURNS = 16, 3


def prepare(folder: Path, count: int) -> None:
    """The texts and the model."""
    torch.manual_seed(0)
    save_texts(folder, count)
    tokenizer = build_model(bundled_llm(), "mean", num_layers=1).tokenizer
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaModel(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    build_model(folder / "llm", "mean", max_seq_length=32).save_pretrained(str(folder / "model"))


def work(folder: Path, output: Path, count: int | None, ready: Path | None) -> None:
    """Encode, and print the second, the texts and the resident memory at each shard."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows = Dataset.load_from_disk(str(folder / "texts"))
    encoder = ModelEncoder(load_trusted(folder / "model", device="cpu"))
    encoding = CorpusEncoding(encoder, rows if count is None else rows.select(range(count)), output, shard_size=SHARD)
    if ready is not None:  # all begin at once, when their imports are done
        ready.touch()
        while not (ready.parent / "go").exists():
            time.sleep(0.01)
    write = encoding._encode

    def noted(number: int, *arguments: object) -> None:
        write(number, *arguments)
        resident = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
        print(f"shard {number} {time.time()} {int(resident[1]) / 1024:.0f}", flush=True)

    encoding._encode = noted
    print(f"begin - {time.time()} 0", flush=True)
    encoding.run()


def workers(folder: Path, output: Path, threads: list[int], count: int | None) -> list[list[str]]:
    """The lines of workers that begin together."""
    signals = Path(tempfile.mkdtemp(dir=folder))
    processes = []
    for worker, number in enumerate(threads):
        command = [sys.executable, "-m", "examples.benchmarks.encode_million", "--work", str(folder), str(output)]
        command += ["--ready", str(signals / str(worker)), *(["--texts", str(count)] if count else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(number)}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    while len(list(signals.iterdir())) < len(threads):
        if any(process.poll() for process in processes):
            raise SystemExit("A worker failed.")
        time.sleep(0.05)
    (signals / "go").touch()
    return [process.communicate()[0].splitlines() for process in processes]


def seconds(lines: list[list[str]]) -> float:
    moments = [float(line.split()[2]) for worker in lines for line in worker if line.startswith(("shard", "begin"))]
    return max(moments) - min(moments)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, help="the number of texts")
    parser.add_argument("--work", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--ready", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work, arguments.texts, arguments.ready)
        return
    count = arguments.texts or 1_000_000
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, count)
        (lines,) = workers(folder, folder / "all", [1], None)
        shards = [line.split() for line in lines if line.startswith("shard")]
        tenth = max(1, len(shards) // 10)
        moments = [float(line.split()[2]) for line in lines]
        first = tenth * SHARD / (moments[tenth] - moments[0])
        last = tenth * SHARD / (moments[-1] - moments[-1 - tenth])
        rates = f"{first:,.0f} texts/s in the first tenth, {last:,.0f} in the last"
        print(f"{count:,} texts in {seconds([lines]):.0f} s: {rates}")
        print(f"resident: {shards[tenth - 1][3]} MB after the first tenth, {shards[-1][3]} MB at the end")
        ways = {"one": [1], "one, two threads": [2], "two": [1, 1]}
        took: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(TURNS):
            left = set()
            for name in list(ways) if turn % 2 else reversed(ways):
                output = folder / f"{turn}, {name}"
                took[name].append(seconds(workers(folder, output, ways[name], min(count, PAIR_SHARDS * SHARD))))
                left.add(tuple(file.read_bytes() for file in sorted(output.glob("0*"))))
            print("the same bytes" if len(left) == 1 else "OTHER BYTES", flush=True)
        for name in ("one", "one, two threads"):
            ratios = [one / two for one, two in zip(took[name], took["two"], strict=True)]
            print(f"two workers are {statistics.median(ratios):.2f} times as fast as {name}: {ratios}")


if __name__ == "__main__":
    main()
