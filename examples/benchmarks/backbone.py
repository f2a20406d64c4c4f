"""What LLMBackbone costs next to sentence-transformers' own Transformer, on SmolLM2-135M with all its 30 layers.

    python -m examples.benchmarks.backbone

Forward: the same weights in both modules, texts of 16, 64 and 256 tokens in batches of 8, tokenized and run in turns;
the figure is the median of the ratios of neighbours. Probe: its time while a saved folder loads, against the
time of ``SentenceTransformer(folder)``, and against that of the whole process with its imports; each in a new process.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from examples.demo.llm import bundled_llm
from st_llm_embed import build_model
from st_llm_embed.hub import save_sealed

LOAD = """
import time
started = time.perf_counter()
import sys
from sentence_transformers import SentenceTransformer
from st_llm_embed.modules import llm_backbone
prove = llm_backbone.set_attention_mode
took = []
def timed(*arguments):
    before = time.perf_counter()
    prove(*arguments)
    took.append(time.perf_counter() - before)
llm_backbone.set_attention_mode = timed
before = time.perf_counter()
SentenceTransformer(sys.argv[1], trust_remote_code=True)
print(took[0], time.perf_counter() - before, time.perf_counter() - started)
"""


def forward_ratio(backbones: list, tokens: int, rounds: int) -> tuple[float, float]:
    """Median ratio of seconds, ours to stock, and its spread (half the interquartile range)."""
    texts = [" ".join(["word"] * (tokens - 2))] * 8
    ratios = []
    with torch.no_grad():
        for turn in range(rounds):
            seconds = [0.0, 0.0]
            for which in (0, 1) if turn % 2 else (1, 0):
                started = time.perf_counter()
                backbones[which](backbones[which].preprocess(texts))
                seconds[which] = time.perf_counter() - started
            ratios.append(seconds[0] / seconds[1])
    low, middle, high = statistics.quantiles(ratios[2:], n=4)  # the first two warm up
    return middle, (high - low) / 2


def main() -> None:
    """Print one table."""
    with tempfile.TemporaryDirectory() as temporary:
        ours = build_model(bundled_llm(), "mean").eval()
        ours.save_pretrained(f"{temporary}/ours")
        stock = SentenceTransformer(str(save_sealed(ours, Path(temporary) / "stock"))).eval()
        assert type(stock[0]).__module__.startswith("sentence_transformers.")
        for tokens, rounds in ((16, 60), (64, 40), (256, 16)):
            middle, spread = forward_ratio([ours[0], stock[0]], tokens, rounds)
            print(f"forward, {tokens} tokens: {middle:.3f} of stock's time (+- {spread:.3f})")
        runs = []
        for _ in range(9):
            command = [sys.executable, "-c", LOAD, f"{temporary}/ours"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append([float(value) for value in done.stdout.split()])
        probe, load, process = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"probe: {1000 * probe:.1f} ms, {probe / load:.2%} of the constructor's {load:.2f} s, ", end="")
        print(f"{probe / process:.2%} of the {process:.1f} s from the first import to the loaded model")


if __name__ == "__main__":
    main()
