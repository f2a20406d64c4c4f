"""Set which tokens of a decoder-only LLM may attend to which, and prove that it took effect.

A causal LLM lets token i see tokens 0..i. NV-Embed (arXiv 2405.17428) drops that mask: every token sees every real
token. transformers does this through ``config.is_causal = False`` for most decoders, but some ignore the flag,
silently, so the mode is never assumed here: two forward passes over 8 tokens show whether the first output moves with
the last token.

A structured mask is a boolean ``(batch, seq, seq)`` tensor, True where the query (second axis) may attend to the key
(third axis); LLaRA's joint prompts (arXiv 2312.15503) need one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

ATTENTION_MODES = ("bidirectional", "causal")
PROBE_LENGTH = 8
# A token that is not attended to changes nothing; one that is moves a random tiny model by more than 1e-3 of its
# scale.
PROBE_THRESHOLD = 1e-5


def set_attention_mode(model: PreTrainedModel, attention: str) -> None:
    """Make ``model`` attend in the given mode, in its saved config too, and prove it by a probe.

    Args:
        model: a decoder-only LLM without its LM head.
        attention: ``"bidirectional"`` or ``"causal"``.

    Raises:
        ValueError: for an unknown mode, an encoder, an encoder-decoder, or an architecture that does not obey the
            mode.
    """
    config = model.config
    if attention not in ATTENTION_MODES:
        raise ValueError(f"attention={attention!r} is unknown. Valid modes: {', '.join(ATTENTION_MODES)}.")
    if config.is_encoder_decoder:
        raise ValueError(
            f"{config.model_type!r} is an encoder-decoder model; LLMBackbone takes decoder-only LLMs. Load it with "
            "sentence_transformers' own Transformer module, which uses its encoder."
        )
    # A saved bidirectional LLM comes back with the flag off, so only a fresh one can be told from an encoder.
    fresh = getattr(config, "is_causal", True)
    if fresh and _last_token_reaches_first(model, padded=False):
        raise ValueError(
            f"{config.model_type!r} is an encoder: its tokens already attend to both sides. LLMBackbone takes "
            "decoder-only LLMs; load an encoder with sentence_transformers' own Transformer module."
        )
    config.is_causal = attention == "causal"
    if attention == "bidirectional":
        _open_sliding_window(model)
    _prove_attention_mode(model, attention)


def _open_sliding_window(model: PreTrainedModel) -> None:
    """Let a bidirectional model see the whole text: NV-Embed ignores Mistral's window."""
    config = model.config.get_text_config()
    # NOTE: architectures that mix windowed and full layers keep their window per layer, where None means something
    # different in each: refused until each is shown to open.
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise ValueError(
            f"{config.model_type!r} has sliding-window layers, which stay windows under attention='bidirectional'. "
            "Use attention='causal', or a base without windowed layers."
        )
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = None


def _prove_attention_mode(model: PreTrainedModel, attention: str) -> None:
    """Raise unless the last token reaches the first position exactly when it should, with and without padding."""
    for padded in (False, True):
        if _last_token_reaches_first(model, padded) != (attention == "bidirectional"):
            raise ValueError(
                f"{model.config.model_type!r} ({model.config._attn_implementation} attention, "
                f"{'a padded batch' if padded else 'no padding'}) does not obey attention={attention!r}: the last "
                f"token {'does not reach' if attention == 'bidirectional' else 'reaches'} the first position. "
                "Recurrent and hybrid models cannot be bidirectional; otherwise try "
                "model_kwargs={'attn_implementation': 'eager'} or another base."
            )


@torch.no_grad()
def _last_token_reaches_first(model: PreTrainedModel, padded: bool) -> bool:
    """Does changing the last real token move the first position's hidden state?"""
    training = model.training
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(PROBE_LENGTH, device=model.device) * 7919 + 101) % vocabulary  # spread over the vocabulary
    ids = ids.repeat(2, 1)  # (2, seq): the text, and the text with another last token
    last = PROBE_LENGTH - 3 if padded else PROBE_LENGTH - 1
    ids[1, last] = (ids[1, last] + vocabulary // 2) % vocabulary
    attention_mask = (torch.arange(PROBE_LENGTH, device=model.device) <= last).long().repeat(2, 1)
    output = model(input_ids=ids, attention_mask=attention_mask)
    model.train(training)
    first = output.last_hidden_state[:, 0].float()  # (2, dim)
    return bool((first[0] - first[1]).abs().max() > PROBE_THRESHOLD * first.abs().max())


def additive_mask(structured_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``(batch, seq, seq)`` "may attend" to the ``(batch, 1, seq, seq)`` additive form.

    NOTE: never hand transformers the boolean form: eager attention ignores it, or adds it as 0 and 1.
    """
    mask = torch.zeros(structured_mask.shape, dtype=dtype, device=structured_mask.device)
    return mask.masked_fill_(~structured_mask, torch.finfo(dtype).min).unsqueeze(1)
