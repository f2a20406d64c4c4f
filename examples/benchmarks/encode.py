"""How fast texts of mixed lengths are encoded: by ``SentenceTransformer.encode`` with stock modules, ``mean`` and
``nv-embed``, and by ``st-llm-embed encode``, which sorts all texts and makes batches of tokens.

    python -m examples.benchmarks.encode ../shared/data

On the first layers of SmolLM2-135M, one thread, float32 but for the last, batches of 32: 500 texts of 8 to 512 tokens,
questions, sentences and answers of WikiQA, SQuAD and MedQuAD (folders in BEIR's layout). All ways in turns; the
figures are medians, those against another way of the rounds' ratios. The limit of the machine is the speed of the
LLM's own matrix products by themselves, measured in the same rounds; a way's share of it counts these alone as useful,
and no padding.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import PreTrainedTokenizerBase

from examples.demo.llm import bundled_llm
from st_llm_embed import build_model
from st_llm_embed.data.beir import read_texts
from st_llm_embed.data.text_files import plain_or_gz
from st_llm_embed.encoding.encoder import encode_texts

LAYERS, MAX_TOKENS, MIN_TOKENS = 6, 512, 8
SOURCES = {
    "wikiqa/queries": 80,
    "squad_sentences/queries": 150,
    "squad_sentences/corpus": 160,
    "wikiqa/corpus": 70,
    "medquad/corpus": 40,
}
ROWS = 1024  # of a matrix product by itself
Way = Callable[[list[str]], Any]  # texts to vectors


def mixed_texts(data: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[int]]:
    """The texts in a random order, and their numbers of tokens."""
    choose = random.Random(0)
    texts: list[str] = []
    for source, count in SOURCES.items():
        lines = [line.document for line in read_texts(plain_or_gz(data / f"{source}.jsonl"))]
        choose.shuffle(lines)
        texts += islice((line for line in lines if len(tokenizer.tokenize(line)) >= MIN_TOKENS), count)
    choose.shuffle(texts)
    return texts, [min(len(tokenizer.tokenize(text)), MAX_TOKENS) for text in texts]


def stock_model(llm: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: str) -> SentenceTransformer:
    """sentence-transformers' own modules on the same LLM."""
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    backbone = Transformer(folder, max_seq_length=MAX_TOKENS)
    return SentenceTransformer(modules=[backbone, Pooling(backbone.get_embedding_dimension(), "mean")])


def products_of(llm: nn.Module) -> Counter[torch.Size]:
    """The shapes of the LLM's matrices, and how many it has of each."""
    return Counter(part.weight.shape for part in llm.modules() if isinstance(part, nn.Linear))


def flops_per_second(products: Counter[torch.Size]) -> float:
    """The machine's speed at these products by themselves."""
    seconds, flops = 0.0, 0
    for (wide, deep), count in products.items():
        tokens, weight = torch.randn(ROWS, deep), torch.randn(wide, deep)
        F.linear(tokens, weight)
        started = time.perf_counter()
        for _ in range(count):
            F.linear(tokens, weight)
        seconds += time.perf_counter() - started
        flops += 2 * count * ROWS * wide * deep
    return flops / seconds


def measure(ways: dict[str, Way], texts: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, the first way first in one and last in the next."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for encode in ways.values():
        encode(texts[:32])
    for turn in range(rounds):
        for name in list(ways) if turn % 2 else reversed(ways):
            started = time.perf_counter()
            ways[name](texts)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of the data sets")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the LLM's 30 (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = str(bundled_llm())
    mean, nv_embed = (
        build_model(base, recipe, num_layers=arguments.layers, max_seq_length=MAX_TOKENS)
        for recipe in ("mean", "nv-embed")
    )
    llm, tokenizer = mean[0].model, mean.tokenizer
    texts, lengths = mixed_texts(arguments.data, tokenizer)
    print(
        f"{len(texts)} texts, {sum(lengths)} tokens: {min(lengths)} to {max(lengths)}, median "
        f"{statistics.median(lengths):.0f}"
    )
    with tempfile.TemporaryDirectory() as folder:
        stock = stock_model(llm, tokenizer, folder)
    rounded = copy.deepcopy(mean).to(torch.bfloat16)
    limits: list[float] = []
    products = products_of(llm)
    ways: dict[str, Way] = {
        "stock": stock.encode,
        "mean": mean.encode,
        "nv-embed": nv_embed.encode,
        "mean, by st-llm-embed encode": lambda texts: encode_texts(mean, texts, "text"),
        "the same in bfloat16": lambda texts: encode_texts(rounded, texts, "text"),
    }
    seconds = measure({**ways, "limit": lambda _: limits.append(flops_per_second(products))}, texts, arguments.rounds)
    flops = 2 * sum(count * shape.numel() for shape, count in products.items())  # of a token
    limit = statistics.median(limits)
    print(
        f"The LLM's matrix products: {flops / 1e6:.1f} MFLOPs a token, {limit / 1e9:.0f} GFLOPs a second by themselves"
    )
    print("| | tokens a second | times as fast as stock | as mean | share of the limit |")
    print("| --- | --- | --- | --- | --- |")
    for name in ways:
        speed = sum(lengths) / statistics.median(seconds[name])
        of_stock, of_mean = (
            statistics.median(other / own for other, own in zip(seconds[against], seconds[name], strict=True))
            for against in ("stock", "mean")
        )
        print(f"| {name} | {speed:.0f} | {of_stock:.2f} | {of_mean:.2f} | {speed * flops / limit:.0%} |")


if __name__ == "__main__":
    main()
