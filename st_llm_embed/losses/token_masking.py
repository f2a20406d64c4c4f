"""Which tokens of a text are masked, and what takes their place.

In: ``input_ids`` and ``maskable``, both ``(batch, seq)``. Out: the same, with the masked tokens and which they are.

A text's masks are drawn from its own tokens and one number of the step, ``draw``. So neither padding nor the other
rows of the batch change them, two processes with one ``draw`` mask their texts differently, and the masks of an
evaluation are the same each time.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

MASKINGS = ("bert", "all")
BLANK = "_"  # in the vocabulary of every LLM that LLM2Vec took, none of which has a mask token
MASK, RANDOM = 0.8, 0.1  # of BERT's masked tokens (arXiv 1810.04805, section 3.1); the others stay as they are


class MaskedTokens(NamedTuple):
    """A batch with masked tokens.

    Args:
        input_ids: the token ids, ``(batch, seq)``.
        chosen: True where a token is to be predicted, ``(batch, seq)``.
    """

    input_ids: Tensor
    chosen: Tensor


def mask_id_of(tokenizer: PreTrainedTokenizerBase, mask_token: str | None = None) -> int:
    """The id of the token that stands for masked ones.

    Args:
        tokenizer: the tokenizer.
        mask_token: the token. Default: the tokenizer's own mask token, or else ``_``.

    Raises:
        ValueError: if the vocabulary lacks it.
    """
    token = mask_token or tokenizer.mask_token or BLANK
    mask_id = tokenizer.get_vocab().get(token)
    if mask_id is None:
        raise ValueError(
            f"mask_token={token!r} is no token of the LLM's vocabulary. Valid: any one token of it, such as "
            f"{tokenizer.eos_token!r}, as tokenizer.get_vocab() has it."
        )
    return mask_id


def mask_tokens(
    input_ids: Tensor,
    maskable: Tensor,
    *,
    share: float,
    mask_id: int,
    words: Tensor | None,
    draw: int,
) -> MaskedTokens:
    """Mask a share of each row's tokens, at least one where there is one.

    Args:
        input_ids: the token ids, ``(batch, seq)``.
        maskable: True where a token may be masked, ``(batch, seq)``.
        share: how many of them are.
        mask_id: the token that takes the place of masked ones.
        words: the token ids that BERT's random tokens are drawn from. None: all masked tokens become ``mask_id``.
        draw: a number of 0..2³² - 1, of which other masks come.
    """
    masked, chosen = input_ids.cpu().clone(), torch.zeros(maskable.shape, dtype=torch.bool)
    for row, (ids, may) in enumerate(zip(masked.clone(), maskable.cpu(), strict=True)):
        places = may.nonzero().squeeze(1)
        if not len(places):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(ids[places].numpy().tobytes(), draw))
        count = max(1, round(share * len(places)))
        places = places[torch.randperm(len(places), generator=generator)[:count]]
        new = torch.full_like(places, mask_id)
        if words is not None:
            lot = torch.rand(count, generator=generator)
            others = words[torch.randint(len(words), (count,), generator=generator)]
            new = torch.where(lot < MASK, new, torch.where(lot < MASK + RANDOM, others, ids[places]))
        masked[row, places] = new
        chosen[row, places] = True
    return MaskedTokens(masked.to(input_ids.device), chosen.to(input_ids.device))
