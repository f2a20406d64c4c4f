"""What a GPU is measured on, one step at a time, each into the same JSON file; ``gpu.sh`` runs them all.

    python -m examples.benchmarks.gpu_steps --output gpu.json --list
    python -m examples.benchmarks.gpu_steps --output gpu.json --step rates

- ``main job``: what a user does, on tiny LLMs, against the CPU (``gpu_main_job.py``).
- ``precision``: bfloat16 by SDPA and by flash attention against float32, batches against single texts.
- ``rates``: tokens a second of ``encode`` against sentence-transformers' own modules, in bfloat16.
- ``memory N``: the peak of training with LoRA on texts of N tokens, with gradient caching, and checkpointing besides.
- ``llara``: EBAE and EBAR on a Llama of a billion random weights.
- ``study ROW``: the study's rows at the size ``gpu``, where the data sets are.

``--size tiny`` runs the same code in small on whatever there is. A step that is in the file is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import LlamaConfig
from transformers.utils import is_flash_attn_2_available

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from conftest import save_llm, train_tokenizer

from examples.benchmarks.gpu_main_job import run as run_main_job
from examples.benchmarks.peak_memory import PeakMemory
from examples.study.prepare import prepare
from examples.study.report import insert_table
from examples.study.run import file_name, rows_of, run_row
from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, PretextLoss, Task, build_model
from st_llm_embed.files import read_json, write_json, written_beside
from st_llm_embed.recipes import RECIPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORDS = "the quick brown fox jumps over a lazy dog while seven cats sleep on the mat and bark at the moon".split()
Figures = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How large the steps are.

    Args:
        small: the shape of the LLM of ``precision`` and ``rates``.
        large: that of ``memory`` and ``llara``.
        texts: the number of texts of ``rates``.
        tokens: the lengths of the texts of ``memory``; the first is that of ``llara``.
        rows: the rows of a batch in training.
        turns: how often each rate is measured.
        study: the study's size.
    """

    small: dict[str, int]
    large: dict[str, int]
    texts: int
    tokens: tuple[int, ...]
    rows: int
    turns: int
    study: str


TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {
    "full": Size(
        # SmolLM2-135M's and TinyLlama-1.1B's
        small={"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 8},
        large={"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
        texts=4_000,
        tokens=(2_048, 8_192),
        rows=16,
        turns=3,
        study="gpu",
    ),
    "tiny": Size(small=TINY, large=TINY, texts=40, tokens=(32, 64), rows=4, turns=1, study="smoke"),
}


def text_of(number: int, words: int) -> str:
    """A text that no other number has, of about as many tokens as words, or more."""
    return " ".join([str(number), *(WORDS[(number + place) % len(WORDS)] for place in range(words))])


@contextmanager
def llm(shape: dict[str, int], longest: int) -> Iterator[str]:
    """The folder of a Llama of random weights."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    tokenizer.model_max_length = longest
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=longest, tie_word_embeddings=True, **shape)
    with tempfile.TemporaryDirectory() as folder:
        yield save_llm(Path(folder, "llm"), config, tokenizer)


def precision(size: Size) -> Figures:
    """The lowest cosines, and the largest difference of a batch from single texts."""
    texts = [text_of(number, 4 + 7 * number % 120) for number in range(64)]
    figures: Figures = {}
    with llm(size.small, 512) as base:
        for recipe in ("mean", "nv-embed"):
            whole = build_model(base, recipe)
            exact = whole.encode(texts, convert_to_tensor=True)
            for attention in attentions():
                half = build_model(base, recipe, model_kwargs={"attn_implementation": attention, "dtype": "bfloat16"})
                half[1].load_state_dict(whole[1].state_dict())
                rounded = half.encode(texts, convert_to_tensor=True)
                single = half.encode(texts, batch_size=1, convert_to_tensor=True)
                name = f"{recipe}, {attention}"
                figures[f"{name}, lowest cosine to float32"] = lowest_cosine(exact, rounded)
                figures[f"{name}, lowest cosine of batches to single texts"] = lowest_cosine(rounded, single)
    return figures


def attentions() -> list[str]:
    return ["sdpa", *(["flash_attention_2"] if DEVICE == "cuda" and is_flash_attn_2_available() else [])]


def lowest_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return round(float(F.cosine_similarity(one.float(), other.float()).min()), 6)


def rates(size: Size) -> Figures:
    """Tokens a second, and medians of the turns' ratios to stock modules."""
    texts = [text_of(number, 6 + 37 * number % 480) for number in range(size.texts)]
    kwargs = {"dtype": torch.bfloat16}
    with llm(size.small, 512) as base:
        backbone = Transformer(base, model_kwargs=kwargs, max_seq_length=512)
        backbone.tokenizer.pad_token = backbone.tokenizer.eos_token  # what build_model does
        pooling = Pooling(backbone.get_embedding_dimension(), "mean")
        ways = {"stock": SentenceTransformer(modules=[backbone, pooling], device=DEVICE)}
        for attention in [
            "sdpa",
            *(["flash_attention_2"] if DEVICE == "cuda" and is_flash_attn_2_available() else []),
        ]:
            for recipe in ("mean", "nv-embed"):
                options = {**kwargs, "attn_implementation": attention}
                ways[f"{recipe}, {attention}"] = build_model(base, recipe, model_kwargs=options, max_seq_length=512)
        tokens = sum(min(len(ids), 512) for ids in backbone.tokenizer(texts)["input_ids"])
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for model in ways.values():
            model.encode(texts[:64], batch_size=64)
        for turn in range(size.turns):
            for name in list(ways) if turn % 2 else reversed(ways):
                seconds[name].append(timed(lambda name=name: ways[name].encode(texts, batch_size=64)))
    figures: Figures = {"texts": len(texts), "tokens": tokens}
    for name, own in seconds.items():
        figures[f"{name}, tokens a second"] = round(tokens / statistics.median(own))
        if name != "stock":
            ratio = statistics.median(a / b for a, b in zip(seconds["stock"], own, strict=True))
            figures[f"{name}, times stock"] = round(ratio, 2)
    return figures


def timed(act: Callable[[], object]) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    act()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_of(act: Callable[[], object]) -> float | str:
    """The megabytes that tensors take at most; on a CPU those that were made inside."""
    if DEVICE == "cpu":
        with PeakMemory() as peak:
            act()
        return round(peak.peak / 1e6, 3)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        act()
    except torch.OutOfMemoryError:
        return "out of memory"
    return round(torch.cuda.max_memory_allocated() / 1e6)


def trainer_of(model: SentenceTransformer, folder: str, rows: Dataset, **arguments: Any) -> LLMEmbedTrainer:
    quiet = {"report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "bf16": True}
    quiet |= {"use_cpu": DEVICE == "cpu"}
    args = LLMEmbedTrainingArguments(folder, max_steps=2, learning_rate=1e-5, **quiet, **arguments)
    if "anchor" in rows.column_names:
        return LLMEmbedTrainer(model, args, {"t": rows}, tasks=[Task("t", "Find it", negatives=0)])
    return LLMEmbedTrainer(model, args, rows, loss=PretextLoss(model))


def memory(size: Size, tokens: int) -> Figures:
    """Peaks of two steps with LoRA: by the gradient cache alone, and by checkpointing besides."""
    pairs = {side: [text_of(number, tokens) for number in range(size.rows)] for side in ("anchor", "positive")}
    figures: Figures = {"rows of a batch": size.rows}
    ways: dict[str, dict[str, Any]] = {
        "gradient cache": {"mini_batch_size": 1},
        "gradient cache, checkpointing": {"mini_batch_size": 1, "gradient_checkpointing": True},
    }
    with llm(size.large, tokens) as base, tempfile.TemporaryDirectory() as folder:
        for name, arguments in ways.items():
            options = {"dtype": torch.bfloat16}
            model = build_model(base, "nv-embed", lora=True, max_seq_length=tokens, model_kwargs=options)
            rows = Dataset.from_dict(pairs)
            trainer = trainer_of(model, folder, rows, per_device_train_batch_size=size.rows, **arguments)
            figures[f"{name}, MB at the peak"] = peak_of(trainer.train)
            del model, trainer
    return figures


def llara(size: Size) -> Figures:
    """Seconds and the peak of a step of EBAE and EBAR on all weights."""
    tokens = size.tokens[0] // 4
    texts = {side: [text_of(number, tokens) for number in range(4 * size.rows)] for side in ("text", "next")}
    with llm(size.large, tokens) as base, tempfile.TemporaryDirectory() as folder:
        model = build_model(base, "llara", max_seq_length=tokens)
        settings = {"per_device_train_batch_size": size.rows, "gradient_checkpointing": True}
        trainer = trainer_of(model, folder, Dataset.from_dict(texts), **settings)
        seconds: list[float] = []
        peak = peak_of(lambda: seconds.append(timed(trainer.train)))
        weights = sum(parameter.numel() for parameter in model.parameters())
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "parameters": weights,
        "texts of a step": 2 * size.rows,
        "tokens of a text": tokens,
        "seconds a step": round(seconds[0] / 2, 2) if seconds else None,
        "MB at the peak": peak,
        "loss": [round(loss, 3) for loss in losses],
    }


def study(row: str | None, arguments: argparse.Namespace) -> Figures:
    """The figures of one row, and what it took; without a row, the data of all."""
    folder = arguments.output.with_suffix("")
    arguments = argparse.Namespace(data=arguments.data, output=folder, size=SIZES[arguments.size].study)
    if row is None:
        prepare(arguments)
        return {}
    run_row(row, 0, arguments)
    return read_json(folder / "rows" / f"{file_name(row)}-0.json")


def steps_of(arguments: argparse.Namespace) -> dict[str, Callable[[], Figures]]:
    """Every step by its name, in its order."""
    size, is_tiny = SIZES[arguments.size], arguments.size == "tiny"
    recipes = ["nv-embed"] if is_tiny else list(RECIPES)
    steps: dict[str, Callable[[], Figures]] = {
        "main job": lambda: run_main_job(recipes, compiles=not is_tiny),
        "precision": lambda: precision(size),
        "rates": lambda: rates(size),
        **{f"memory {tokens}": lambda tokens=tokens: memory(size, tokens) for tokens in size.tokens},
        "llara": lambda: llara(size),
    }
    if arguments.data is not None:
        steps["study's data"] = lambda: study(None, arguments)
        steps |= {f"study {row}": lambda row=row: study(row, arguments) for row in rows_of(size.study)}
    return steps


def table(content: dict[str, Any]) -> str:
    """Every figure of every step but the study's, which has tables of its own."""
    lines = [f"| {content['device']}, torch {content['torch']} | |", "| --- | --- |"]
    for step, figures in content["steps"].items():
        if not step.startswith("study"):
            lines += [f"| {step}: {name} | {figure} |" for name, figure in figures.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run one step, or list those that are left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file of all figures")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--data", type=Path, help="the folder of the study's data sets")
    parser.add_argument("--step", help="the step to run")
    parser.add_argument("--list", action="store_true", help="print the steps that are left")
    parser.add_argument("--readme", type=Path, help='the Markdown file that shows the table, at the mark "gpu"')
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    content = read_json(arguments.output) if arguments.output.is_file() else {}
    content = {"device": name, "torch": torch.__version__, "size": arguments.size, "steps": {}, **content}
    if (content["device"], content["size"]) != (name, arguments.size):
        parser.error(f"{arguments.output} is of {content['device']}, {content['size']}. Name another file.")
    steps = steps_of(arguments)
    left = [step for step in steps if step not in content["steps"]]
    if arguments.list:
        print("".join(f"{step}\n" for step in left), end="")
    elif arguments.readme:
        insert_table(arguments.readme, "gpu", table(content))
    elif arguments.step not in steps:
        parser.error(f"--step {arguments.step!r} is unknown. Steps: {', '.join(steps)}.")
    elif arguments.step in left:
        start = time.perf_counter()
        figures = steps[arguments.step]()
        content["steps"][arguments.step] = {**figures, "seconds": round(time.perf_counter() - start)}
        with written_beside(arguments.output.resolve()) as staged:
            write_json(staged, content)
        print(json.dumps({arguments.step: content["steps"][arguments.step]}, indent=1), flush=True)


if __name__ == "__main__":
    main()
