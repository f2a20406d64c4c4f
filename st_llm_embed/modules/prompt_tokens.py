"""The tokens of a prompt around a batch's texts: which they are, and how they are put in, after tokenizing.

In and out: ``input_ids``, ``attention_mask`` and ``instruction_mask``, each ``(batch, seq)``, padded on either side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


def insert_prefix(features: dict[str, Any], prefix_ids: list[int], before: int) -> None:
    """Put the prompt's part before the text after each row's ``before`` tokens (BOS); both stay out of the pool."""
    first = features["attention_mask"].argmax(dim=1, keepdim=True)  # (batch, 1): each row's first real token
    columns = torch.arange(features["input_ids"].shape[1], device=first.device)
    features["instruction_mask"] = ((columns >= first) & (columns < first + before)).long()
    insert_tokens(features, prefix_ids, first + before, instruction=1)


def insert_suffix(
    features: dict[str, Any], suffix_ids: list[int], after: int, eos_token_id: int | None = None
) -> None:
    """Put the prompt's part after the text before each row's ``after`` last tokens (EOS).

    Args:
        features: the batch's features.
        suffix_ids: the token ids of that part.
        after: how many tokens the tokenizer puts after every text.
        eos_token_id: the id of a token that may end a text besides those, and then stays behind the part.
    """
    columns = torch.arange(features["input_ids"].shape[1], device=features["input_ids"].device)
    last = (columns * features["attention_mask"]).argmax(dim=1, keepdim=True)  # (batch, 1): the last real token
    insert_at = last + features["attention_mask"].amax(dim=1, keepdim=True) - after  # a row may have no token
    if eos_token_id is not None:
        insert_at -= (features["input_ids"].gather(1, last) == eos_token_id).long()
    insert_tokens(features, suffix_ids, insert_at, instruction=0)


def insert_tokens(features: dict[str, Any], ids: list[int], insert_at: Tensor, instruction: int) -> None:
    """Insert ``ids`` into each row before column ``insert_at`` ``(batch, 1)``: every row grows by the same number."""
    batch, seq = features["input_ids"].shape
    columns = torch.arange(seq, device=insert_at.device)
    moved_to = columns + (columns >= insert_at) * len(ids)  # (batch, seq): where each column goes
    new_columns = insert_at + torch.arange(len(ids), device=insert_at.device)  # (batch, len(ids))
    new = torch.tensor(ids, device=insert_at.device).expand(batch, -1)
    fills = {
        "input_ids": new,
        "attention_mask": torch.ones_like(new),
        "instruction_mask": torch.full_like(new, instruction),
    }
    for key in fills.keys() & features.keys():
        old = features[key]
        grown = old.new_zeros(batch, seq + len(ids)).scatter(1, moved_to, old)
        features[key] = grown.scatter(1, new_columns, fills[key])


def cut_texts(features: dict[str, Any], max_length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Truncate each row to ``max_length`` tokens by those that follow its prompt: the text loses its beginning."""
    mask, instruction = features["attention_mask"], features["instruction_mask"]
    columns = torch.arange(mask.shape[1], device=mask.device)
    start = mask.argmax(dim=1, keepdim=True) + instruction.sum(dim=1, keepdim=True)  # (batch, 1): of the text
    excess = (mask.sum(dim=1, keepdim=True) - max_length).clamp(min=0)
    kept = mask.bool() & ~((columns >= start) & (columns < start + excess))  # (batch, seq)
    width = int(kept.sum(dim=1).max())
    if tokenizer.padding_side == "left":
        order = kept.long().argsort(dim=1, stable=True)[:, -width:]
    else:
        order = (~kept).long().argsort(dim=1, stable=True)[:, :width]
    real = kept.gather(1, order)
    features["attention_mask"] = real.long()
    features["instruction_mask"] = instruction.gather(1, order) * real
    features["input_ids"] = features["input_ids"].gather(1, order).masked_fill(~real, tokenizer.pad_token_id)


def pad_to_width(features: dict[str, Any], width: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad a batch to ``width`` columns."""
    missing = width - features["input_ids"].shape[1]
    sides = (missing, 0) if tokenizer.padding_side == "left" else (0, missing)
    for key, fill in {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "instruction_mask": 0}.items():
        if key in features:
            features[key] = nn.functional.pad(features[key], sides, value=fill)


def exact_instruction_mask(offsets: Tensor, features: dict[str, Any], prefix_length: int) -> Tensor:
    """``(batch, seq)``: 1 from the first token (BOS too) to the last token that lies wholly inside the prompt.

    A token that straddles the border, such as ``▁are`` of ``"Query: are"``, belongs to the text.
    """
    start, end = offsets.unbind(-1)  # (batch, seq), in characters of prompt + text
    inside = (end > start) & (end <= prefix_length)
    # Up to and including the last such token: BOS has no characters of its own, and neither has EOS after it.
    up_to_last = inside.long().flip(1).cummax(dim=1).values.flip(1)
    return up_to_last * features["attention_mask"]
