"""What latent attention pooling costs next to SmolLM2-135M, in the form of this package and in the literal one.

    python -m examples.benchmarks.latent_attention

The literal form does what the released NV-Embed code does: it repeats the latents for every text of the batch,
projects keys and values for each, and runs every step on padding too. Both hold the same weights, run in turns on 2
threads, and give the same embeddings. ``head_dim`` 72 is this package's default for a width of 576; 576 is NV-Embed's
proportion.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peak_memory import PeakMemory
from torch import Tensor

from examples.demo.llm import bundled_llm
from st_llm_embed import LatentAttentionPooling, LLMBackbone, build_model

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def literal_pooling(layer: LatentAttentionPooling, features: dict[str, Tensor]) -> Tensor:
    """``(batch, dim)``, computed as the released code does."""
    tokens, mask = features["token_embeddings"], features["attention_mask"]  # (batch, seq, dim), (batch, seq)
    heads = layer.num_heads
    latents = layer.latents.unsqueeze(0).repeat(len(tokens), 1, 1)  # (batch, latents, dim)
    queries = layer.to_q(layer.token_norm(tokens))
    keys, values = layer.to_kv(layer.latent_norm(latents)).chunk(2, dim=-1)
    queries, keys, values = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys, values))
    attended = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
    tokens = tokens + layer.to_out(attended)
    value, gate = layer.mlp_in(layer.mlp_norm(tokens)).chunk(2, dim=-1)
    tokens = tokens + layer.mlp_out(value * F.gelu(gate))
    return (tokens * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def compare(backbone: LLMBackbone, layer: LatentAttentionPooling, tokens: int, rounds: int) -> str:
    """One table row."""
    texts = [" ".join(["word"] * (tokens - 2 - i % 4)) for i in range(16)]
    features = backbone(backbone.preprocess(texts))
    torch.testing.assert_close(layer(dict(features))["sentence_embedding"], literal_pooling(layer, features), **CLOSE)
    times = []
    for turn in range(rounds):
        runs = [
            lambda: backbone(backbone.preprocess(texts)),
            lambda: layer(dict(features)),
            lambda: literal_pooling(layer, features),
        ]
        order = [0, 1, 2] if turn % 2 else [2, 1, 0]
        measured = {which: seconds(runs[which]) for which in order}
        times.append([measured[which] for which in range(3)])
    ratio = statistics.median(literal / ours for _, ours, literal in times[1:])
    share = statistics.median(ours / (llm + ours) for llm, ours, _ in times[1:])
    literal_share = statistics.median(literal / (llm + literal) for llm, _, literal in times[1:])
    return f"| {layer.head_dim} | {tokens} | {share:.1%} | {literal_share:.1%} | {ratio:.1f} |"


def peak_megabytes(layer: LatentAttentionPooling, rows: int, form: str) -> float:
    """Of ``rows`` texts of 16 tokens, beyond what goes in."""
    torch.manual_seed(0)
    features = {
        "token_embeddings": torch.randn(rows, 16, layer.embedding_dimension),
        "attention_mask": torch.ones(rows, 16, dtype=torch.long),
    }
    with PeakMemory() as memory:
        layer(features) if form == "ours" else literal_pooling(layer, features)
    return memory.peak / 1e6


@torch.no_grad()
def main() -> None:
    """Print two tables."""
    torch.set_num_threads(2)
    backbone = build_model(bundled_llm(), "mean")[0].eval()
    width = backbone.get_embedding_dimension()
    layers = [LatentAttentionPooling(width, head_dim=size).eval() for size in (width // 8, width)]
    print("| head_dim | tokens | pooling's share of encoding | in the literal form | times faster |")
    print("| --- | --- | --- | --- | --- |")
    for layer in layers:
        for tokens, rounds in ((16, 20), (64, 12), (256, 6)):
            print(compare(backbone, layer, tokens, rounds), flush=True)
    print("\n| head_dim | texts | peak MB | in the literal form |\n| --- | --- | --- | --- |")
    for layer in layers:
        for rows in (16, 128, 512):
            print(f"| {layer.head_dim} | {rows} |", end="")
            print(" |".join(f" {peak_megabytes(layer, rows, form):.0f}" for form in ("ours", "literal")), "|")


if __name__ == "__main__":
    main()
