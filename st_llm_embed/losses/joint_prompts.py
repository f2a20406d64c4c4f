"""A text under both of LLaRA's prompts in one row: one pass gives both embeddings (arXiv 2312.15503, section 3).

The two suffixes stand one after the other, cannot see each other, and both start at the position after the text:

    position    0 1 2 3 | 4 5 6 7 | 4 5 6 7
    tokens      t e x t | S E L F | N E X T        SELF sees text and SELF, NEXT sees text and NEXT, text sees text

Out: what ``LLMBackbone.forward`` takes, each ``(batch, seq)``, ``structured_mask`` ``(batch, seq, seq)``, padded on
the right; and the columns of both embeddings.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from st_llm_embed.modules.attention_probe import AttentionProbe

TEXT, SELF, NEXT, PAD = range(4)  # the blocks of a row


@dataclass
class JointPrompts:
    """A batch of texts with both suffixes: the backbone's features and where the two embeddings are."""

    texts: list[list[int]]  # each row's token ids, without suffixes
    features: dict[str, Tensor]
    self_positions: Tensor  # (batch, num_tokens): the last tokens of SELF
    next_positions: Tensor  # (batch, num_tokens): the last tokens of NEXT


def join_prompts(
    texts: list[list[int]],
    self_ids: Sequence[int],
    next_ids: Sequence[int],
    *,
    num_tokens: int,
    pad: int,
    causal: bool,
    device: torch.device,
) -> JointPrompts:
    """Build ``text SELF NEXT`` for a batch.

    Args:
        texts: each row's token ids, with what the prompts have before the text.
        self_ids: the token ids of EBAE's suffix.
        next_ids: the token ids of EBAR's suffix.
        num_tokens: how many last tokens of each suffix carry the embedding.
        pad: the token id of padding.
        causal: whether a token sees none after it.
        device: the device of the tensors.
    """
    self_ids, next_ids = list(self_ids), list(next_ids)
    tail = len(self_ids) + len(next_ids)
    seq = max(map(len, texts)) + tail
    input_ids = torch.tensor([row + self_ids + next_ids + [pad] * (seq - tail - len(row)) for row in texts])
    input_ids = input_ids.to(device)  # (batch, seq)
    length = torch.tensor([[len(row)] for row in texts], device=device)  # (batch, 1)
    columns = torch.arange(seq, device=device).expand_as(input_ids)
    next_start = length + len(self_ids)
    starts = torch.stack([length, next_start, next_start + len(next_ids)], dim=2)  # (batch, 1, 3): SELF, NEXT, PAD
    block = (columns.unsqueeze(2) >= starts).sum(dim=2)  # (batch, seq), of TEXT, SELF, NEXT and PAD
    # NEXT restarts where SELF started, so that each suffix stands as if the other were not there.
    position_ids = columns - (block >= NEXT) * len(self_ids)
    query, key = block.unsqueeze(2), block.unsqueeze(1)
    structured_mask = (key == TEXT) & (query != PAD) | (key == query)  # padding sees padding: no empty row
    if causal:
        structured_mask &= torch.ones(seq, seq, dtype=torch.bool, device=device).tril()
    last = torch.arange(-num_tokens, 0, device=device)
    return JointPrompts(
        texts,
        {
            "input_ids": input_ids,
            "attention_mask": (block != PAD).long(),
            "position_ids": position_ids,
            "structured_mask": structured_mask,
        },
        self_positions=next_start + last,
        next_positions=next_start + len(next_ids) + last,
    )


def check_llm(llm: PreTrainedModel) -> None:
    """Check that an LLM gives each prompt of such a row the embedding that it has by itself.

    Raises:
        ValueError: if it counts positions by itself, or passes information between tokens other than by attention
            under a mask: then the second prompt would hear the first.
    """
    refusal = "so LLaRA's two prompts cannot share a row. Choose another base for EBAE and EBAR."
    if "position_ids" not in inspect.signature(llm.forward).parameters:
        raise ValueError(f"{llm.config.model_type!r} counts positions by itself and takes no position_ids, {refusal}")
    # NOTE: gpt_neo counts the tokens of its local attention by columns, whatever their positions.
    if llm.config.model_type == "gpt_neo" or AttentionProbe(llm).mixes_without_attention():
        raise ValueError(
            f"{llm.config.model_type!r} passes information between tokens other than by attention under a mask, "
            f"{refusal}"
        )
