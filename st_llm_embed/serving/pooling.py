"""The poolings of published models on texts one behind the other, as a server computes them: a row for every token.

What they compute is told in ``modules/``; here it is done again in few lines of torch, for a server's environment has
no sentence-transformers, and never runs code of a model's folder.

In: ``tokens`` ``(total, dim)``, the number of tokens of each text ``lengths`` ``(batch,)``, and ``in_text``
``(total,)``, False at tokens of a prompt that is left out. Out: ``(batch, dim)`` in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 2048  # tokens: how many queries to the latents are alive at once
MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # a token's weight, by its place from the start and the end
    "mean": lambda start, end: torch.ones_like(start),
    "weightedmean": lambda start, end: start,
    "lasttoken": lambda start, end: end == 1,
}


def check_pooling(name: str, config: Mapping[str, Any]) -> None:
    """Check that ``pool`` computes a pooling.

    Raises:
        ValueError: for a stock pooling that it does not compute.
    """
    mode = config.get("pooling_mode")
    if name == "Pooling" and (not isinstance(mode, str) or mode not in MODES):
        raise ValueError(f"pooling_mode={mode!r} is not served. Served modes: {', '.join(MODES)}.")


def pool(
    name: str,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    lengths: Tensor,
    in_text: Tensor,
) -> Tensor:
    """Pool each text's tokens.

    Args:
        name: the class of the pooling module.
        config: its settings.
        weights: its saved weights by name.
        tokens: ``(total, dim)`` hidden states of all texts.
        lengths: ``(batch,)`` how many tokens each text has.
        in_text: ``(total,)`` whether a token counts: not of a prompt that is left out.

    Returns:
        ``(batch, dim)`` in float32.
    """
    numbers = torch.arange(len(lengths), device=tokens.device)
    row = numbers.repeat_interleave(lengths)  # (total,): which text a token belongs to
    start = torch.arange(1, len(row) + 1, device=tokens.device) - (lengths.cumsum(0) - lengths)[row]
    end = lengths[row] - start + 1
    if not in_text.all():
        counts = torch.zeros_like(lengths).index_add(0, row, in_text.long())
        in_text = in_text | (counts == 0)[row]  # a text of its prompt alone is pooled over it
    if name == "LatentAttentionPooling":
        return _latent_attention(config, weights, tokens, row, in_text, len(lengths))
    if name == "PromptTokenPooling":
        return _weighted_mean(tokens, end <= config["num_tokens"], row, len(lengths))
    return _weighted_mean(tokens, MODES[config["pooling_mode"]](start, end) * in_text, row, len(lengths))


def _weighted_mean(values: Tensor, weights: Tensor, row: Tensor, batch: int) -> Tensor:
    """``(batch, dim)``: the mean of ``values`` ``(total, dim)`` of each text, weighed by ``weights`` ``(total,)``."""
    weights = weights.float()
    sums = values.new_zeros(batch, values.shape[1], dtype=torch.float32)
    sums = sums.index_add(0, row, values.float() * weights.unsqueeze(1))
    return sums / weights.new_zeros(batch).index_add(0, row, weights).unsqueeze(1)


def _latent_attention(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], tokens: Tensor, row: Tensor, in_text: Tensor, batch: int
) -> Tensor:
    """Each token queries the latents, through an MLP, both residual; then the mean, before the MLP's last map."""
    tokens, row = tokens[in_text].to(weights["latents"].dtype), row[in_text]
    heads = config["num_heads"]

    def norm(name: str, states: Tensor) -> Tensor:
        return F.layer_norm(states, states.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def by_head(states: Tensor) -> Tensor:
        return states.unflatten(-1, (heads, -1)).transpose(0, 1)  # (heads, length, head_dim)

    keys, values = F.linear(norm("latent_norm", weights["latents"]), weights["to_kv.weight"]).chunk(2, dim=-1)
    attended, inner = [], []
    for chunk in tokens.split(CHUNK):
        queries = by_head(F.linear(norm("token_norm", chunk), weights["to_q.weight"]))
        found = F.scaled_dot_product_attention(queries, by_head(keys), by_head(values)).transpose(0, 1).flatten(1)
        attended.append(chunk + F.linear(found, weights["to_out.weight"]))
        if config["mlp"] is not None:
            states = F.linear(norm("mlp_norm", attended[-1]), weights["mlp_in.weight"], weights["mlp_in.bias"])
            value, *gate = states.chunk(2, dim=-1) if config["mlp"] == "geglu" else (states,)
            inner.append(value * F.gelu(gate[0]) if gate else F.gelu(value))
    ones = torch.ones_like(row)
    pooled = _weighted_mean(torch.cat(attended), ones, row, batch)
    if inner:
        mean = _weighted_mean(torch.cat(inner), ones, row, batch).to(tokens.dtype)
        pooled = pooled + F.linear(mean, weights["mlp_out.weight"], weights["mlp_out.bias"]).float()
    return F.normalize(pooled, dim=-1) if config["normalize"] else pooled


def project(config: Mapping[str, Any], weights: Mapping[str, Tensor], pooled: Tensor) -> Tensor:
    """sentence-transformers' ``Dense`` on ``(batch, in_features)``.

    Args:
        config: its saved settings.
        weights: its saved weights by name.
        pooled: ``(batch, in_features)``.
    """
    activation = getattr(nn, config["activation_function"].rpartition(".")[2])()
    weight = weights["linear.weight"]
    return activation(F.linear(pooled.to(weight.dtype), weight, weights.get("linear.bias"))).float()


def check_dense(config: Mapping[str, Any]) -> None:
    """Check that ``project`` computes a ``Dense``.

    Raises:
        ValueError: for one with a residual, an activation that is none of torch's, or one that reads or writes other
            than the embedding.
    """
    name = config["activation_function"]
    if not name.startswith("torch.nn.modules.") or not hasattr(nn, name.rpartition(".")[2]):
        raise ValueError(f"Dense with activation_function={name!r} is not served. Served are those of torch.nn.")
    embedding = "sentence_embedding"
    for key, served in (("module_input_name", embedding), ("module_output_name", embedding), ("use_residual", False)):
        if config.get(key, served) not in (None, served):
            raise ValueError(f"Dense with {key}={config[key]!r} is not served. Served is {served!r}.")
