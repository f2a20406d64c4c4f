"""What shorter vectors cost in training: steps of a student with and without MatryoshkaLoss, in turns on one model.

    python -m examples.benchmarks.matryoshka

SmolLM2's first six layers, mean pooling, a projection to 384 dimensions, 32 texts a step: the match with a teacher's
vectors, as the study's row "mean, distilled"; with its scores too; and that at three widths. Each with the whole batch
at once, and in mini-batches of 8 by the gradient cache. Medians of the turns, and ratios to the first of its kind.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import nn

from examples.demo.llm import bundled_llm
from st_llm_embed import InstructionContrastiveLoss, build_model
from st_llm_embed.losses import DistillationLoss
from st_llm_embed.teaching.alignment import unfitted, with_projection, without_length

DIM, WIDTHS, TEXTS = 384, [384, 192, 96], 32
WORDS = "the quick brown fox jumps over a lazy dog while seven cats sleep on the mat and bark at the moon".split()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = without_length(build_model(bundled_llm(), "mean", num_layers=6, max_seq_length=128))
    model = with_projection(model, unfitted(model.get_embedding_dimension(), DIM)).train()
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(10 + 2 * i)) for i in range(TEXTS)]  # 10 to 72 words
    features = model.preprocess(texts) | {"teacher_embedding": torch.randn(TEXTS, DIM)}

    def losses(mini_batch_size: int | None) -> dict[str, nn.Module]:
        def distil(score_weight: float) -> DistillationLoss:
            contrastive = InstructionContrastiveLoss(model, mini_batch_size=mini_batch_size)
            return DistillationLoss(model, contrastive, score_weight=score_weight, contrastive_weight=0)

        several = MatryoshkaLoss(model, distil(0.2), WIDTHS)
        return {"vectors": distil(0), "vectors and scores": distil(0.2), f"both, at {WIDTHS}": several}

    print("| loss | batch | seconds a step | ratio |\n| --- | --- | ---: | ---: |")
    for mini_batch_size in (None, 8):
        of_kind = losses(mini_batch_size)
        seconds: dict[str, list[float]] = {name: [] for name in of_kind}
        for turn in range(arguments.turns + 1):
            for name, loss in of_kind.items():
                model.zero_grad()
                start = time.perf_counter()
                loss([dict(features)], None).backward()
                if turn:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
        medians = {name: median(own) for name, own in seconds.items()}
        batch = "whole" if mini_batch_size is None else f"{mini_batch_size} at a time"
        for name, own in medians.items():
            print(f"| {name} | {batch} | {own:.3f} | {own / medians['vectors']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
