"""Make a decoder-only LLM causal or bidirectional, and prove, layer by layer, that it took effect.

A causal LLM lets token i see tokens 0..i. NV-Embed (arXiv 2405.17428) drops that mask: every token sees every real
token.

What the configuration can do, it does, for it is saved in ``config.json`` and needs no code of ours: sliding windows
are opened there, and ``is_causal = False`` makes most architectures bidirectional. Where that is not enough (stablelm
and nemotron under sdpa, chunked attention), the masks are changed in each forward pass (``attention_mask.py``); the
short convolutions between the attention layers of LFM2 are centred besides (``short_convolution.py``). Nothing is
assumed: a probe shows it (``attention_probe.py``).
"""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from .attention_mask import attending
from .attention_probe import AttentionProbe
from .short_convolution import causal_convolutions, centre_convolutions
from .sliding_windows import open_windows

ATTENTION_MODES = ("bidirectional", "causal")
WINDOW_MODES = ("full", "keep")
ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}


def check_decoder(config: PretrainedConfig) -> None:
    """Check that a model is a decoder-only LLM, as far as its configuration says.

    Raises:
        ValueError: for an encoder, or an encoder-decoder.
    """
    if config.is_encoder_decoder or config.model_type in ENCODERS:
        kind = "encoder-decoder model" if config.is_encoder_decoder else "encoder"
        raise ValueError(
            f"{config.model_type!r} is an {kind}, whose tokens need no leave to attend to both sides; LLMBackbone "
            "takes decoder-only LLMs. Load it with sentence_transformers' own Transformer module."
        )


def set_attention_mode(model: PreTrainedModel, attention: str, window: str = "full", probe: bool = True) -> None:
    """Make ``model`` attend in the given mode and prove it. Forward passes then go inside ``attending``.

    Afterwards ``config.is_causal`` says how: False where the config alone makes the model bidirectional.

    Args:
        model: a decoder-only LLM without its LM head.
        attention: ``"bidirectional"`` or ``"causal"``.
        window: what becomes of sliding windows and chunks: ``"full"`` opens them, ``"keep"`` leaves them, and makes
            them symmetric where the attention is bidirectional. (Where the config does it, transformers lets tokens
            at a distance of the window's size in; its causal windows end one before.)
        probe: whether to prove it. Without the proof, a config that says ``is_causal: false`` is believed, and any
            other model has its masks replaced.

    Raises:
        ValueError: for an unknown mode, an encoder, an encoder-decoder, or an architecture that does not obey.
    """
    config = model.config
    if attention not in ATTENTION_MODES:
        raise ValueError(f"attention={attention!r} is unknown. Valid modes: {', '.join(ATTENTION_MODES)}.")
    if window not in WINDOW_MODES:
        raise ValueError(f"window={window!r} is unknown. Valid values: {', '.join(WINDOW_MODES)}.")
    check_decoder(config)
    implementation = config._attn_implementation
    flash = "flash" in implementation
    if window == "full":
        open_windows(model)
    causal_convolutions(model)
    centred = centre_convolutions(model) if attention == "bidirectional" else []
    no_mask = (
        f"{config.model_type!r} is not made bidirectional by its config, and {implementation} takes no mask. Use "
        "model_kwargs={'attn_implementation': 'sdpa'}."
    )
    if centred and flash:  # which would take a batch for one text
        raise ValueError(no_mask)
    if not probe:
        believed = flash or (getattr(config, "is_causal", True) is False and not centred)
        config.is_causal = attention == "causal" or not believed
        return
    refusal = (
        f"{config.model_type!r} under {implementation} attention does not obey attention={attention!r} with "
        f"window={window!r} in every layer. Try model_kwargs={{'attn_implementation': 'eager'}}, or choose another "
        "base."
    )
    prober = AttentionProbe(model, centred)
    if attention == "causal":
        config.is_causal = True
        if not prober.obeys(attention, window):
            raise ValueError(refusal)
        return
    if prober.mixes_without_attention():
        causal_convolutions(model)
        config.is_causal = True
        way_out = "Choose another base."
        if prober.obeys("causal", window):
            way_out = "Build it causal, by the recipe 'last-token' (attention='causal'), or choose another base."
        raise ValueError(
            f"{config.model_type!r} passes information between tokens other than by attention under a mask, as "
            "recurrence, convolution and summaries do. That stays causal: it cannot be bidirectional. "
            f"{way_out}"
        )
    config.is_causal = False
    try:
        if not centred and prober.obeys(attention, window):  # a config centres nothing
            return
    except (AttributeError, TypeError):
        pass  # mpt, and modernbert-decoder under eager, fail for want of a mask; other errors come again below
    config.is_causal = True
    if flash:
        raise ValueError(no_mask)
    with attending(model, attention):
        if not prober.obeys(attention, window):
            raise ValueError(refusal)
