"""The tokens that a tokenizer itself puts around every text, BOS and EOS: read, added, dropped.

All in the tokenizer's own post-processor, so that stock modules reload them too.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers.processors import Sequence as ProcessorSequence
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase


def set_special_tokens(tokenizer: PreTrainedTokenizerBase, model_type: str, end: bool) -> None:
    """See that a tokenizer has what an LLMBackbone needs: character offsets, EOS, and something to pad with.

    Args:
        tokenizer: the LLM's tokenizer.
        model_type: the LLM's type, for the message.
        end: whether the tokenizer shall end every text with a special token: its own, or else EOS.

    Raises:
        ValueError: for a slow tokenizer, or one without EOS.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} has no character offsets, which the instruction mask needs. Save it as a "
            "fast tokenizer (tokenizer.json) first."
        )
    if tokenizer.eos_token is None:
        raise ValueError(
            f"The tokenizer of {model_type!r} has no EOS token. Pass processor_kwargs={{'eos_token': '<a token of its "
            "vocabulary>'}."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if end and not special_ids(tokenizer)[1]:
        append_eos(tokenizer)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids that the tokenizer itself puts before every text (BOS), and after it (EOS)."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    return ids[: special.index(0)], ids[len(ids) - special[::-1].index(0) :]


def drop_text_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer put no special token after a text."""
    processor = tokenizer.backend_tokenizer.post_processor
    if processor is None:
        return
    state = json.loads(processor.__getstate__())
    for template in _templates(state):
        while "SpecialToken" in template["single"][-1]:
            template["single"].pop()
    processor.__setstate__(json.dumps(state).encode())
    tokenizer.backend_tokenizer.post_processor = processor


def append_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer itself end every text with EOS, within its maximum length."""
    eos = tokenizer.eos_token
    processor = tokenizer.backend_tokenizer.post_processor
    state = {} if processor is None else json.loads(processor.__getstate__())
    # NOTE: two templates in a row lose the second one's token, so an existing template (BOS) is extended.
    if templates := _templates(state):
        templates[0]["single"].append({"SpecialToken": {"id": eos, "type_id": 0}})
        templates[0]["special_tokens"][eos] = {"id": eos, "ids": [tokenizer.eos_token_id], "tokens": [eos]}
        processor.__setstate__(json.dumps(state).encode())
    else:
        template = TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)])
        processor = ProcessorSequence([template] if processor is None else [processor, template])
    tokenizer.backend_tokenizer.post_processor = processor


def _templates(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a post-processor's state that put special tokens around texts."""
    return [part for part in state.get("processors", [state]) if part.get("type") == "TemplateProcessing"]
