"""Embed all columns of a batch in groups of like length, so that little of what is computed is padding.

Queries are shorter than documents, tasks differ, and a row without a negative has an empty text in its place: padded
column by column, about half of a blended batch is padding. The texts of all columns are sorted by length and go
through the model in as many groups as there are columns. Each text's embedding is the same; only the company it is
padded to is another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns, merge_feature_batches
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from st_llm_embed.modules import LLMBackbone
from st_llm_embed.modules.row_groups import cut_to_length

ON_CPU = 16  # texts of a group


def embed_by_length(model: nn.Module, columns: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The embeddings of each column, ``(batch, dim)``.

    Columns that cannot be put together (the host's pooling leaves out one prompt for a whole batch; unpadded batches;
    other features than tokens) go through the model as in the host's losses.
    """
    columns = list(columns)
    merged = None if leaves_out_one_prompt(model) else merge_feature_batches(_with_instruction_masks(columns))
    if merged is None or "attention_mask" not in merged:
        return embed_columns(model, columns)
    order = merged["attention_mask"].sum(dim=1).argsort(descending=True, stable=True)
    # By the number of texts alone, as all processes must go through the model equally often.
    small = -(-len(order) // ON_CPU) if order.device.type == "cpu" else 0
    chunks = order.chunk(max(len(columns), small))
    groups = [model(cut_to_length(merged, rows)[0])["sentence_embedding"] for rows in chunks]
    return list(torch.cat(groups)[order.argsort()].chunk(len(columns)))


def leaves_out_one_prompt(model: nn.Module) -> bool:
    """Does the host's pooling leave the prompt out? Where no LLMBackbone tells it each text's own, it knows of one,
    for all texts that it gets at a time."""
    modules = list(model.modules())
    return not any(isinstance(module, LLMBackbone) for module in modules) and any(
        isinstance(module, Pooling) and not module.include_prompt for module in modules
    )


def _with_instruction_masks(columns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An LLMBackbone's prompted texts have masks, which say all that the length of the prompt does; others have none,
    which is one that covers nothing."""
    if not any("instruction_mask" in column for column in columns):
        return columns
    return [
        {
            "instruction_mask": torch.zeros_like(column["input_ids"]),
            **{key: value for key, value in column.items() if key != "prompt_length"},
        }
        for column in columns
    ]
