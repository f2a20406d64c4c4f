"""Which decoders of the installed transformers can be made bidirectional: measured, on tiny random models.

Every text decoder that ``AutoModelForCausalLM`` knows is built with two or so layers, one of each of its kinds, and
windows of 4 tokens. Three things are measured on 20 tokens under each attention implementation: whether
``set_attention_mode`` accepts it, and by config or by mask; whether then every token hears the last one; and whether
LLaRA's joint prompt in one causal pass with a structured mask equals two separate passes.

    python -m examples.architectures.survey
    python -m examples.architectures.survey llama gemma3_text --output table.md
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from st_llm_embed.files import check_file_writable, written_beside
from st_llm_embed.modules.attention_mask import attending
from st_llm_embed.modules.attention_mode import ENCODERS, set_attention_mode

IMPLEMENTATIONS = ("sdpa", "eager")
TEXT = list(range(3, 17))
SUFFIXES = ([20, 21, 22], [23, 24, 25])
# Of images or sound, halves of encoder-decoders, heads of another model, or fed with more than tokens.
OTHERS = {"bert-generation", "blt", "git", "moshi", "phi4_multimodal", "trocr", "xlnet"}
OTHERS |= {"gemma4_assistant", "gemma4_unified_assistant"}

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dff", "ffn_hidden_size", "dim_ff"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_local_experts", "num_experts"), 4),
    **dict.fromkeys(("n_routed_experts", "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_d_conv", "mamba_n_heads"), 4),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 4),  # far shorter than the 20 tokens
    **dict.fromkeys(("head_dim", "global_head_dim", "dim_head", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mamba_d_head"), 16),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "index_n_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 512),
    "index_topk": 64,  # more than there are tokens: all of them
    "num_kv_shared_layers": 0,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
# What does not follow from the sizes alone.
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"head_dim": 8, "num_expert_group": 1, "num_local_experts": 4, "num_experts_per_token": 2},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), ROPE)},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"n_input_layers": 1, "n_output_layers": 0},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_d_head": 8},
    "gemma3n_text": {"activation_sparsity_pattern": None},
    # 512 is too much for weights that never learnt
    "gemma4_unified_text": {"per_layer_config": {"1": {"head_dim": 8}}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "kimi_linear": {"model_max_length": 128, "num_local_experts": 4, "num_experts_per_token": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"moe_topk": 2, "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "head_dim": 4},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "linear_attention"]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Finding:
    """What was measured of one architecture under one attention implementation.

    ``mode`` is ``config`` or ``mask`` (fully bidirectional, and how), ``refused``, ``absent`` (no such implementation)
    or ``failed``; ``joint`` says whether the joint prompt equals its parts; ``reason`` is the error of the last three.
    """

    mode: str
    joint: bool = False
    reason: str = ""


def decoder_types() -> list[str]:
    """Model types of the text decoders, recurrent and hybrid ones too, of the installed transformers."""
    found = []
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if name not in CONFIG_MAPPING or name in ENCODERS or name in OTHERS:
            continue
        try:
            config = CONFIG_MAPPING[name]()
        except (ValueError, StrictDataclassError):  # made of other models, which it must be given
            continue
        # Of an LLM with images, its text half is listed by itself.
        if not config.is_encoder_decoder and config.get_text_config() is config:
            found.append(name)
    return found


def tiny_config(model_type: str) -> PretrainedConfig:
    """A configuration of a few thousand weights, with one layer of each of the architecture's kinds."""
    default = CONFIG_MAPPING[model_type]()
    known = default.to_dict()
    sizes = {
        name: size
        for name, size in SIZES.items()
        if known.get(name) is not None or (name in known and name.endswith("token_id"))
    }
    if "kv_lora_rank" in sizes:  # latent attention: as many keys as queries, and their size is a sum
        sizes["num_key_value_heads"] = 4
        sizes.pop("head_dim", None)
    # Of those that can be set; dory saves twice as many.
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or [])) if "layer_types" in known else []
    if len(kinds) > 1:
        sizes |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    return type(default)(**{**sizes, **SPECIAL.get(model_type, {})})


def examine(model_type: str, implementation: str) -> Finding:
    """Measure one architecture under one attention implementation. The weights are random, by torch's seed."""
    try:
        config = tiny_config(model_type)
        model = AutoModel.from_config(config, attn_implementation=implementation).eval()
    except Exception as error:
        absent = "does not support an attention implementation" in str(error)
        return Finding("absent" if absent else "failed", reason=f"{type(error).__name__}: {error}")
    try:
        joint = _joint_equals_separate(model)
        set_attention_mode(model, "bidirectional")
        mode = "config" if model.config.is_causal is False else "mask"
        return Finding(mode, joint) if _every_token_hears_the_last(model) else Finding("failed", joint, "not in fact")
    except ValueError as error:
        return Finding("refused", reason=str(error))
    except Exception as error:
        return Finding("failed", reason=f"{type(error).__name__}: {error}")


@torch.no_grad()
def _states(model: PreTrainedModel, ids: Sequence[int], **inputs: Tensor) -> Tensor:
    """``(seq, dim)``: the last hidden states of one text."""
    ids = torch.tensor([ids])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs).last_hidden_state[0]


def _every_token_hears_the_last(model: PreTrainedModel) -> bool:
    ids = TEXT + SUFFIXES[0] + SUFFIXES[1]
    with attending(model, "bidirectional"):
        before, after = _states(model, ids), _states(model, [*ids[:-1], 30])
    return bool(((before - after).abs().amax(dim=-1) > 1e-6).all())


def _joint_equals_separate(model: PreTrainedModel) -> bool:
    """``text SELF NEXT``, the suffixes blind to each other and at the same positions, against each by itself."""
    text, (self_suffix, next_suffix) = len(TEXT), SUFFIXES
    start = text + len(self_suffix)
    mask = torch.ones(1, start + len(next_suffix), start + len(next_suffix), dtype=torch.bool).tril()
    mask[:, start:, text:start] = False
    positions = torch.tensor([[*range(start), *range(text, text + len(next_suffix))]])
    try:
        set_attention_mode(model, "causal", window="keep")
        separate = [_states(model, TEXT + suffix)[text:] for suffix in SUFFIXES]
        with attending(model, "causal", mask, positions):
            joint = _states(model, TEXT + self_suffix + next_suffix, position_ids=positions)[text:]
    except (TypeError, ValueError):  # takes no positions, or is not proven
        return False
    return bool((joint - torch.cat(separate)).abs().max() <= 1e-5)


def survey(model_types: Sequence[str]) -> dict[str, dict[str, Finding]]:
    """``examine`` every model type under sdpa and eager."""
    findings: dict[str, dict[str, Finding]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model_type in model_types:
            torch.manual_seed(0)
            findings[model_type] = {name: examine(model_type, name) for name in IMPLEMENTATIONS}
    return findings


def as_markdown(findings: dict[str, dict[str, Finding]]) -> str:
    """The counts, and a table of the architectures by what was found."""
    lines = [f"Measured with transformers {transformers.__version__} and torch {torch.__version__}.", ""]
    for implementation in IMPLEMENTATIONS:
        column = [by_implementation[implementation] for by_implementation in findings.values()]
        count = Counter(finding.mode for finding in column)
        lines.append(
            f"- {implementation}: {count['config']} fully bidirectional by config, {count['mask']} by mask, "
            f"{count['refused']} refused, {count['failed']} failed, {count['absent']} without {implementation}; "
            f"{sum(finding.joint for finding in column)} with joint prompts equal to their parts."
        )
    groups: dict[tuple[str, ...], list[str]] = {}
    for model_type, by_implementation in findings.items():
        present = [finding for finding in by_implementation.values() if finding.mode != "absent"]
        modes = [finding.mode.replace("absent", "–") for finding in by_implementation.values()]
        joint = "yes" if present and all(finding.joint for finding in present) else "no"
        reasons = [finding.reason for finding in present if finding.reason]
        reason = reasons[0].splitlines()[0].split(". ")[0].removeprefix(f"{model_type!r} ") if reasons else ""
        groups.setdefault((*modes, joint, reason), []).append(model_type)
    lines += ["", f"| {' | '.join(IMPLEMENTATIONS)} | joint prompts | architectures |"]
    lines += ["| --- |" + " --- |" * (len(IMPLEMENTATIONS) + 1)]
    for (*outcome, reason), names in sorted(groups.items(), key=lambda group: -len(group[1])):
        because = f" ({reason.rstrip('.')})" if reason else ""
        lines.append(f"| {' | '.join(outcome)} | {', '.join(names)}{because} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write it to a file if asked to.

    Raises:
        ValueError: for model types that this transformers does not have.
        OSError: if the file cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m examples.architectures.survey", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("model_type", nargs="*", help="the model types to measure, such as llama (default: all)")
    parser.add_argument("--output", type=Path, help="the Markdown file to write the table to as well")
    arguments = parser.parse_args(argv)
    if arguments.output:
        if arguments.output.is_dir():
            raise IsADirectoryError(f"--output {arguments.output} is a folder. Name a file, such as architectures.md.")
        check_file_writable(arguments.output)
    logging.set_verbosity_error()  # the configurations are tiny, and their token ids are not
    known = decoder_types()
    if unknown := sorted(set(arguments.model_type) - set(known)):
        raise ValueError(f"Unknown model types {unknown}. This transformers has the decoders: {', '.join(known)}.")
    table = as_markdown(survey(arguments.model_type or known))
    print(table)
    if arguments.output:
        with written_beside(arguments.output) as staged:
            staged.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
