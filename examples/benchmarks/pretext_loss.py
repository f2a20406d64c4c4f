"""What LLaRA's pretext losses cost, in the form of this package and in the plain one.

    python -m examples.benchmarks.pretext_loss

Memory: the autoregressive term's, forward and backward, for 2,048 positions of 49,152 words, against all logits at
once. Time: one joint pass over texts of 256 tokens against one pass for each prompt, on SmolLM2-135M with 8 layers.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from peak_memory import PeakMemory

from examples.demo.llm import bundled_llm
from st_llm_embed import PretextLoss, build_model


def memory(loss: PretextLoss, tokens: int = 2048) -> tuple[float, float]:
    """Peak megabytes of the term here and of the plain one, after checking that they agree."""
    texts = [torch.randint(3, 49152, (tokens + 1,)).tolist()]
    hidden = torch.randn(1, tokens + 1, 576, requires_grad=True)
    peaks, values = [], []
    for form in ("here", "plain"):
        loss.zero_grad()
        hidden.grad = None
        with PeakMemory() as peak:
            if form == "here":
                value = loss._autoregressive_loss(hidden, texts, [1])
            else:
                value = F.cross_entropy(
                    F.linear(hidden[0, :-1], *loss._vocabulary_projection()).float(), torch.tensor(texts[0][1:])
                )
            value.backward()
        values.append((value.detach(), hidden.grad.clone()))
        peaks.append(peak.peak / 1e6)
        del value
    torch.testing.assert_close(values[0], values[1], atol=1e-5, rtol=1e-4)
    return peaks[0], peaks[1]


@torch.no_grad()
def joint_share(loss: PretextLoss, tokens: int = 256, rounds: int = 9) -> float:
    """Median time of a joint pass over that of two prompted passes."""
    model = loss.model
    texts = [" ".join(["word"] * tokens)] * 4
    ids = [row.tolist() for row in model.preprocess(texts)["input_ids"]]
    shares = []
    for _ in range(rounds):
        started = time.perf_counter()
        model[0](loss.join_prompts(ids, model.device).features)
        middle = time.perf_counter()
        for prompt in (loss.self_prompt, loss.next_prompt):
            model[0](model.preprocess(texts, prompt=prompt))
        shares.append((middle - started) / (time.perf_counter() - middle))
    return statistics.median(shares[1:])


def main() -> None:
    """Print both."""
    torch.manual_seed(0)
    model = build_model(bundled_llm(), "llara", num_layers=8, max_seq_length=512).eval()
    loss = PretextLoss(model)
    here, plain = memory(loss)
    print(f"autoregressive term: {here:.0f} MB at its peak, {here / plain:.1%} of the plain form's {plain:.0f} MB")
    print(f"joint pass: {joint_share(loss):.1%} of the time of two passes")


if __name__ == "__main__":
    main()
