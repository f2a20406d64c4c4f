"""sentence-transformers' own ``Pooling(include_prompt=False)``, row by row.

It leaves out as many tokens as the prompt alone has, of every row of a batch alike: of ``"Query: "`` before ``"cat"``,
which share the token ``▁cat``, that is one too many, and of a template's parts it knows nothing. Behind an LLMBackbone
it gets each row's own number, from the exact instruction mask.
"""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.sentence_transformer.modules import Pooling


def pool_text(pooling: Pooling, args: tuple[dict[str, Any]], features: dict[str, Any]) -> dict[str, Any]:
    """A forward hook for ``Pooling``: pool again, each row without the tokens of its ``instruction_mask``.

    A row with no token but its prompt's is pooled over the prompt.
    """
    if pooling.include_prompt or "instruction_mask" not in features:
        return features
    mask = features["attention_mask"]  # (batch, seq)
    lengths = (features["instruction_mask"] * mask).sum(dim=1)  # (batch,): the prompt and what is before it
    lengths = lengths.masked_fill(lengths == mask.sum(dim=1), 0)
    groups = [(lengths == length).nonzero().squeeze(1) for length in lengths.unique()]  # of rows alike
    pooled = []
    for rows in groups:
        group = {"token_embeddings": features["token_embeddings"][rows], "attention_mask": mask[rows]}
        group["prompt_length"] = int(lengths[rows[0]])
        pooled.append(pooling.forward(group)["sentence_embedding"])
    features["sentence_embedding"] = torch.cat(pooled)[torch.cat(groups).argsort()]
    return features
