"""What it saves to put texts of all columns through the model in groups of like length.

    python -m examples.benchmarks.length_groups

Forward and backward on SmolLM2-135M with 4 layers, against sentence-transformers' way (anchors, then all documents
together), on batches of the demo's two tasks: summaries of Python's documentation with what they describe, and blended
with documentation by package. Then on single texts, as a teacher speaks of: each batch as it comes, and with rows of
like length together. Both ways in turn, the same batches; medians of the ratios.
"""

from __future__ import annotations

import statistics
import time

import torch
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import embed_columns

from examples.demo.demo import PACKAGES, RETRIEVAL
from examples.demo.llm import bundled_llm
from examples.demo.standard_library import load_standard_library
from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, Task, build_model
from st_llm_embed.losses.length_groups import embed_by_length
from st_llm_embed.training.taught_data import StandIn

ROUNDS = 12
WAYS = {"grouped": embed_by_length, "host": embed_columns}
TEXTS = Task("texts", kind="documents")


def single_texts(pairs: Dataset) -> Dataset:
    """Both sides of pairs, as texts by themselves."""
    sides = [pairs.select_columns([name]).rename_column(name, "text") for name in ("anchor", "positive")]
    return concatenate_datasets(sides)


def measure(model: SentenceTransformer, trainer: LLMEmbedTrainer, name: str) -> None:
    """Print one kind of batches' ratio, and the speed."""
    tokens: list[int] = []
    hook = model[0].register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]["input_ids"].numel()))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    computed, real = dict.fromkeys(WAYS, 0), []
    for batch, _ in zip(trainer.get_train_dataloader(), range(ROUNDS), strict=False):
        columns, _ = trainer.collect_features(batch)
        for column in columns:
            column.pop("teacher_embedding", None)
        for way, embed in WAYS.items():
            tokens.clear()
            started = time.perf_counter()
            sum(column.sum() for column in embed(model, [dict(column) for column in columns])).backward()
            seconds[way].append(time.perf_counter() - started)
            computed[way] += sum(tokens)
        real.append(sum(int(column["attention_mask"].sum()) for column in columns))
    hook.remove()
    ratio = statistics.median(h / g for h, g in zip(seconds["host"][1:], seconds["grouped"][1:], strict=True))
    speed = sum(real[1:]) / sum(seconds["grouped"][1:])
    shares = ", ".join(f"{way} {count / ROUNDS:.0f}" for way, count in computed.items())
    print(
        f"{name}: {ratio:.2f} times faster, {speed:.0f} real tokens a second; tokens computed a step: {shares}, real "
        f"{sum(real) / ROUNDS:.0f}",
        flush=True,
    )


def main() -> None:
    """Print the ratios of both stages, and of single texts."""
    torch.manual_seed(0)
    library = load_standard_library()
    data = {RETRIEVAL.name: library.retrieval(0), PACKAGES.name: library.classification(seed=0)}
    model = build_model(bundled_llm(), num_layers=4, max_seq_length=128)
    for stage, names in ((1, [RETRIEVAL.name]), (2, list(data))):
        args = LLMEmbedTrainingArguments(
            "unused", stage=stage, per_device_train_batch_size=16, report_to=[], max_steps=ROUNDS
        )
        rows = {name: data[name] for name in names}
        measure(model, LLMEmbedTrainer(model, args, rows, tasks=[RETRIEVAL, PACKAGES]), f"stage {stage}")
    rows = {TEXTS.name: single_texts(data[RETRIEVAL.name])}
    for order in ("random", "group_by_length"):
        args = LLMEmbedTrainingArguments(
            "unused", per_device_train_batch_size=32, report_to=[], max_steps=ROUNDS, train_sampling_strategy=order
        )
        teacher = StandIn(model.get_embedding_dimension())
        measure(model, LLMEmbedTrainer(model, args, rows, tasks=[TEXTS], teacher=teacher), f"single texts, {order}")


if __name__ == "__main__":
    main()
