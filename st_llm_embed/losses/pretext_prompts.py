"""The two prompts of the pretext tasks as tokens: what stands before the text, and the two ends that follow it."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from st_llm_embed.modules.special_tokens import special_ids
from st_llm_embed.recipes import EBAE_PROMPT, EBAR_PROMPT


class PretextPrompts(NamedTuple):
    """EBAE's and EBAR's prompts.

    Args:
        prefix: what both have before the text.
        text_start: the number of special tokens before the text (BOS).
        end_ids: the special tokens after it (EOS).
        self_ids: the tokens of EBAE's prompt after the text, EOS included.
        next_ids: the tokens of EBAR's.
    """

    prefix: str
    text_start: int
    end_ids: list[int]
    self_ids: list[int]
    next_ids: list[int]


def read_prompts(
    tokenizer: PreTrainedTokenizerBase,
    add_eos: bool,
    max_seq_length: int | None,
    self_prompt: str = EBAE_PROMPT,
    next_prompt: str = EBAR_PROMPT,
    num_tokens: int = 1,
) -> PretextPrompts:
    """Tokenize the prompts.

    Args:
        tokenizer: the backbone's tokenizer.
        add_eos: whether every text ends with EOS.
        max_seq_length: the largest number of tokens of a text, prompt included; None for no limit.
        self_prompt, next_prompt, num_tokens: see ``PretextLoss``.

    Raises:
        ValueError: for prompts without ``{text}``, that begin differently or leave no room for text, or that have
            fewer than ``num_tokens`` tokens.
    """
    for prompt in (self_prompt, next_prompt):
        if "{text}" not in prompt:
            raise ValueError(f"The pretext prompt {prompt!r} must contain '{{text}}'.")
    (prefix, _, self_suffix), (other_prefix, _, next_suffix) = (
        prompt.partition("{text}") for prompt in (self_prompt, next_prompt)
    )
    if prefix != other_prefix:
        raise ValueError(f"The pretext prompts begin differently: {prefix!r} and {other_prefix!r}.")
    before, after = special_ids(tokenizer)
    end_ids = after or ([tokenizer.eos_token_id] if add_eos else [])
    suffixes = []
    for prompt, suffix in ((self_prompt, self_suffix), (next_prompt, next_suffix)):
        ids = tokenizer(suffix, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"The prompt part {suffix!r} has no tokens. Give it some text.")
        ids = ids + end_ids
        if not 1 <= num_tokens <= len(ids):
            raise ValueError(f"num_tokens={num_tokens} is outside 1..{len(ids)}, the length of {prompt!r}.")
        if max_seq_length is not None and len(ids) >= max_seq_length:
            raise ValueError(
                f"{prompt!r} takes {len(ids)} tokens, which leaves no room for text within "
                f"max_seq_length={max_seq_length}. Raise max_seq_length or shorten the prompt."
            )
        suffixes.append(ids)
    return PretextPrompts(prefix, len(before), end_ids, *suffixes)
