"""What an ONNX graph costs and what eight bits lose: nDCG@10 on retrieval sets, file sizes, and the time of one text
and of a batch of 32 against ``SentenceTransformer.encode`` in float32 and in bfloat16 on the same cores.

    python -m examples.benchmarks.onnx_int8 MODEL --data ../shared/data --sets scifact cranfield

MODEL is the folder of a sentence-transformers model. Of each set some queries of its test split, the documents that
are judged for them and others, as in the study. All ways in turns; the figures of time are medians of the rounds'
ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from sentence_transformers import SentenceTransformer

from examples.benchmarks.alignment import ndcg
from examples.benchmarks.encode import measure
from examples.study.prepare import retrieval_test
from st_llm_embed.data.beir import read_qrels, read_texts
from st_llm_embed.serving.encode_onnx import OnnxEncoder
from st_llm_embed.serving.onnx_export import export_onnx
from st_llm_embed.trust import load_trusted

Encode = Callable[[list[str], str], np.ndarray]  # texts under a prompt


def figures(folder: Path, prompts: dict[str, str], ways: dict[str, Encode]) -> dict[str, float]:
    """nDCG@10 of one set by every way."""
    documents = {line.id: line.document for line in read_texts(folder / "corpus.jsonl.gz")}
    queries = {line.id: line.text for line in read_texts(folder / "queries.jsonl.gz")}
    relevant: dict[str, list[str]] = {query: [] for query in queries}
    for query, document, _ in read_qrels(folder / "qrels" / "test.tsv"):
        relevant[query].append(document)
    found = {}
    for name, encode in ways.items():
        asked = encode([*queries.values()], prompts.get("query", ""))
        index = encode([*documents.values()], prompts.get("document", ""))
        found[name] = ndcg(torch.from_numpy(asked @ index.T), [*documents], [*relevant.values()])
    return found


def by_torch(model: SentenceTransformer) -> Encode:
    return lambda texts, prompt: model.encode(texts, prompt=prompt, show_progress_bar=False).astype(np.float32)


def by_onnx(encoder: OnnxEncoder) -> Encode:
    return lambda texts, prompt: encoder.encode(texts, prompt=prompt)


def main() -> None:
    """Print three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--sets", nargs="*", default=[], help="retrieval sets in it")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=11, help="of the measurement of time; 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_trusted(arguments.model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    with tempfile.TemporaryDirectory() as scratch:
        encoders: dict[str, Any] = {}
        sizes = {"model.safetensors": size_of(Path(arguments.model))}
        for precision in ("float32", "int8"):
            folder = export_onnx(model, Path(scratch, precision), precision=precision)
            encoders[f"ONNX {precision}"] = OnnxEncoder(folder, sess_options=options)
            sizes[f"ONNX {precision}"] = size_of(folder / "onnx")
        for name, size in sizes.items():
            print(f"{name}: {size / 1e6:.1f} MB, {size / sizes['model.safetensors']:.2f} of the model's")
        ways = {"torch float32": by_torch(model)} | {name: by_onnx(encoder) for name, encoder in encoders.items()}
        total: dict[str, list[float]] = {name: [] for name in ways}
        for name in arguments.sets:
            target = Path(scratch, name)
            target.mkdir()
            size = {"queries": arguments.queries, "documents": arguments.documents}
            retrieval_test(arguments.data / name, target, size)
            found = figures(target, model.prompts, ways)
            print(name, {way: round(figure, 4) for way, figure in found.items()}, flush=True)
            for way, figure in found.items():
                total[way].append(figure)
        if arguments.sets:
            print("mean nDCG@10", {way: round(float(np.mean(own)), 4) for way, own in total.items()})
        if arguments.rounds:
            time_ways(arguments, model, ways)


def size_of(folder: Path) -> int:
    """Bytes of the weights and graphs in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.name.startswith("model"))


def time_ways(arguments: argparse.Namespace, model: SentenceTransformer, ways: dict[str, Encode]) -> None:
    """The time of one text of about 24 tokens, and of a batch of 32 texts of 8 to 128."""
    rounded = by_torch(load_trusted(arguments.model, model_kwargs={"dtype": torch.bfloat16}))
    ways = {**ways, "torch bfloat16": rounded}
    words = "the quick brown fox jumps over a lazy dog while seven cats sleep".split()
    one = " ".join(words[place % len(words)] for place in range(22))
    batch = [" ".join(words[(i + place) % len(words)] for place in range(6 + 4 * i)) for i in range(32)]
    print("| | against torch float32 | against torch bfloat16 | milliseconds |")
    for name, texts in {"one text": [one], "a batch of 32": batch}.items():
        calls = {way: lambda own, encode=encode: encode(own, "") for way, encode in ways.items()}
        seconds = measure(calls, texts, arguments.rounds)
        for way, own in seconds.items():
            ratios = [
                statistics.median(a / b for a, b in zip(seconds[other], own, strict=True))
                for other in ("torch float32", "torch bfloat16")
            ]
            print(f"| {name}, {way} | {ratios[0]:.2f} | {ratios[1]:.2f} | {1000 * statistics.median(own):.1f} |")


if __name__ == "__main__":
    main()
