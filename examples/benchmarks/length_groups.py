"""What it saves to put texts of all columns through the model in groups of like length.

    python -m examples.benchmarks.length_groups

Forward and backward on SmolLM2-135M with 4 layers, against sentence-transformers' way (anchors, then all documents
together), on batches of the demo's two tasks: summaries of Python's documentation with what they describe, and blended
with documentation by package. Both ways in turn, the same batches; medians of the ratios.
"""

from __future__ import annotations

import statistics
import time

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns

from examples.demo.demo import PACKAGES, RETRIEVAL
from examples.demo.llm import bundled_llm
from examples.demo.standard_library import load_standard_library
from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, build_model
from st_llm_embed.losses.length_groups import embed_by_length

ROUNDS = 12
WAYS = {"grouped": embed_by_length, "host": embed_columns}


def main() -> None:
    """Print both stages' ratios."""
    torch.manual_seed(0)
    model = build_model(bundled_llm(), num_layers=4, max_seq_length=128)
    library = load_standard_library()
    data = {RETRIEVAL.name: library.retrieval(0), PACKAGES.name: library.classification(seed=0)}
    tokens: list[int] = []
    model[0].register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]["input_ids"].numel()))
    for stage, names in ((1, [RETRIEVAL.name]), (2, list(data))):
        args = LLMEmbedTrainingArguments(
            "unused", stage=stage, per_device_train_batch_size=16, report_to=[], max_steps=ROUNDS
        )
        trainer = LLMEmbedTrainer(model, args, {name: data[name] for name in names}, tasks=[RETRIEVAL, PACKAGES])
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        computed = dict.fromkeys(WAYS, 0)
        for batch, _ in zip(trainer.get_train_dataloader(), range(ROUNDS), strict=False):
            columns, _ = trainer.collect_features(batch)
            for way, embed in WAYS.items():
                tokens.clear()
                started = time.perf_counter()
                sum(column.sum() for column in embed(model, [dict(column) for column in columns])).backward()
                seconds[way].append(time.perf_counter() - started)
                computed[way] += sum(tokens)
            real = sum(int(column["attention_mask"].sum()) for column in columns)
        ratio = statistics.median(h / g for h, g in zip(seconds["host"][1:], seconds["grouped"][1:], strict=True))
        shares = ", ".join(f"{way} {count / ROUNDS:.0f}" for way, count in computed.items())
        print(f"stage {stage}: {ratio:.2f} times faster; tokens computed a step: {shares} (real, last step: {real})")


if __name__ == "__main__":
    main()
