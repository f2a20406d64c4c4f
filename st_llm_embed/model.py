"""``build_model``: the one place where backbone, pooling and prompts are joined into a plain SentenceTransformer.

A recipe names what its paper fixes; every argument of the backbone and of the pooling can be overridden by name.
"""

from __future__ import annotations

import inspect
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from sentence_transformers.util import is_sentence_transformer_model
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from st_llm_embed.gguf import unpack_gguf
from st_llm_embed.hub.trust import demand_base, demand_data, demand_no_code
from st_llm_embed.modules import LatentAttentionPooling, LLMBackbone, PromptTokenPooling
from st_llm_embed.modules.adapters import demand_peft
from st_llm_embed.modules.llm_backbone import drop_text_end
from st_llm_embed.tasks import (
    EBAE_PROMPT,
    EBAR_PROMPT,
    RELEASE_EBAE_PROMPT,
    RELEASE_EBAR_PROMPT,
    RELEASE_TOKENS,
)

# peft takes these for the experts' own weights, of whatever module they are.
EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
KERNEL_NAMES = {"dt_proj", "out_proj"}


@dataclass(frozen=True)
class Recipe:
    """The parts of one way to make an embedding model: pooling class, default arguments, LoRA, prompts."""

    pooling: type[Module]
    defaults: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    added_tokens: list[str] = field(default_factory=list)


def _llara_prompts(ebae: str, ebar: str) -> dict[str, str]:
    """EBAE's prompt for similarity and documents, EBAR's for queries."""
    return {"similarity": ebae, "passage": ebae, "document": ebae, "query": ebar}


RECIPES = {
    # arXiv 2405.17428. Task prompts come with the training data.
    "nv-embed": Recipe(
        LatentAttentionPooling, {"attention": "bidirectional"}, {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1}
    ),
    # arXiv 2312.15503: the paper's variant, and the released code's.
    "llara": Recipe(
        PromptTokenPooling,
        {"attention": "causal"},
        {"r": 64, "lora_alpha": 16, "lora_dropout": 0.1},
        _llara_prompts(EBAE_PROMPT, EBAR_PROMPT),
        "similarity",
    ),
    "llara-release": Recipe(
        PromptTokenPooling,
        {"attention": "causal", "add_eos": False, "num_tokens": 8},
        {"r": 64, "lora_alpha": 16, "lora_dropout": 0.1},
        _llara_prompts(RELEASE_EBAE_PROMPT, RELEASE_EBAR_PROMPT),
        "similarity",
        RELEASE_TOKENS,
    ),
    "mean": Recipe(Pooling, {"attention": "bidirectional", "pooling_mode": "mean"}),
    "last-token": Recipe(Pooling, {"attention": "causal", "pooling_mode": "lasttoken"}),
}


def build_model(
    base: str | Path, recipe: str = "nv-embed", *, lora: bool = False, **overrides: Any
) -> SentenceTransformer:
    """Make a text-embedding model of a decoder-only LLM.

    Args:
        base: a Hub id, a local folder, or a ``.gguf`` file.
        recipe: ``nv-embed``, ``llara``, ``llara-release`` (16 added tokens, whose embeddings begin at the mean of the
            others, plus noise of a tenth of their standard deviation), ``mean`` or ``last-token``.
        lora: train the LLM by the recipe's LoRA (``nv-embed``: r 16, alpha 32; LLaRA's: r 64, alpha 16; dropout 0.1
            on every linear map of the layers; where there are experts, only on those outside of them and not in their
            place). What the recipe adds, tokens too, trains in full either way.
        **overrides: arguments of ``LLMBackbone`` (``attention``, ``num_layers``, ``max_seq_length``, ``model_kwargs``,
            ...) and of the recipe's pooling module (``num_latents``, ``head_dim``, ...).

    Returns:
        A SentenceTransformer of backbone, pooling and ``Normalize``, untrained where the recipe adds weights.

    Raises:
        ValueError: for an unknown recipe or override, a base that cannot be found, one that is not a decoder-only LLM
            or is an embedding model already, or ``lora`` where the recipe has none.
        ImportError: for ``lora`` where peft is older than the installed transformers takes.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is unknown. Valid recipes: {', '.join(RECIPES)}.")
    chosen = RECIPES[recipe]
    if lora and chosen.lora is None:
        with_lora = ", ".join(name for name, known in RECIPES.items() if known.lora)
        raise ValueError(
            f"recipe={recipe!r} names no LoRA; {with_lora} do. Use model.add_adapter(peft.LoraConfig(...)) instead."
        )
    if lora:
        demand_peft()
    backbone_names = (_argument_names(LLMBackbone) | _argument_names(Transformer)) - {"model_name_or_path", "kwargs"}
    pooling_names = _argument_names(chosen.pooling) - {"embedding_dimension"}
    if unknown := sorted(set(overrides) - backbone_names - pooling_names):
        raise ValueError(
            f"build_model got unknown arguments {unknown}. The backbone takes {sorted(backbone_names)}; "
            f"{chosen.pooling.__name__} takes {sorted(pooling_names)}."
        )
    arguments = {**chosen.defaults, **overrides}
    backbone = _load_backbone(base, {k: v for k, v in arguments.items() if k in backbone_names})
    added_ids = _add_tokens(backbone, chosen.added_tokens)
    if added_ids and not backbone.add_eos:  # the recipe pools the last ones, which its prompts end in
        drop_text_end(backbone.tokenizer)
    pooling = chosen.pooling(
        backbone.get_embedding_dimension(), **{k: v for k, v in arguments.items() if k in pooling_names}
    )
    model = SentenceTransformer(
        modules=[backbone, pooling, Normalize()],
        prompts=chosen.prompts,
        default_prompt_name=chosen.default_prompt_name,
        similarity_fn_name="cosine",
    )
    if lora:
        embeddings = backbone.model.get_input_embeddings()
        name = next(name for name, module in backbone.model.named_modules() if module is embeddings)
        trained_tokens = {"trainable_token_indices": {name: added_ids}} if added_ids else {}
        targets = {"target_modules": _lora_targets(backbone.model), **trained_tokens}
        model.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, **targets, **chosen.lora))
    return model


def _lora_targets(llm: PreTrainedModel) -> list[str]:
    """Names of the linear maps that take LoRA with dropout.

    Not among them: routers and grouped maps, which are linear in class only; what state-space kernels read without
    calling it; and, beside experts, the names under which peft would adapt the experts' weights, at their full size at
    every step and without dropout.
    """
    modules = dict(llm.named_modules())
    has_experts = any(name.endswith("experts") for name in modules)
    targets = []
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        kinds = f"{type(module).__name__} {type(modules[parent]).__name__}"
        if not isinstance(module, (nn.Linear, Conv1D)) or "Router" in kinds or leaf == "router" or "Grouped" in kinds:
            continue
        if (has_experts and leaf in EXPERT_NAMES) or (leaf in KERNEL_NAMES and hasattr(modules[parent], "conv1d")):
            continue
        targets.append(name)
    return targets


def _add_tokens(backbone: LLMBackbone, tokens: list[str]) -> list[int]:
    """Give the LLM tokens of its own; those that it has already keep their embeddings. Gives all their ids."""
    tokenizer, known = backbone.tokenizer, len(backbone.tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens], special_tokens=True)
    # An LLM may have more rows than its tokenizer has tokens.
    if len(tokenizer) > backbone.model.get_input_embeddings().num_embeddings:
        backbone.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if new := len(tokenizer) - known:
        weight = backbone.model.get_input_embeddings().weight.detach()
        std, mean = torch.std_mean(weight[:known].float(), dim=0)
        noise = torch.randn(new, len(mean), device=weight.device)
        weight[known : len(tokenizer)] = (mean + 0.1 * std * noise).to(weight.dtype)
    return tokenizer.convert_tokens_to_ids(tokens)


def _argument_names(module: type[Module]) -> set[str]:
    return set(inspect.signature(module.__init__).parameters) - {"self"}


def _load_backbone(base: str | Path, arguments: dict[str, Any]) -> LLMBackbone:
    path = Path(base)
    if path.suffix == ".gguf":
        with tempfile.TemporaryDirectory() as folder:
            unpack_gguf(path, Path(folder), arguments.pop("num_layers", None))
            backbone = LLMBackbone(folder, **arguments)
        backbone.model.config._name_or_path = path.stem
        backbone.model.name_or_path = ""  # which no adapter could load: its base is saved with it
        return backbone
    try:
        if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(f"{path} has no config.json")
        if path.is_dir():
            demand_data(path, pickles=True)  # of which transformers reads tensors only
            demand_no_code(path, _consents(arguments))
            demand_base(path, _consents(arguments))
        _demand_llm(str(base), arguments.get("model_kwargs") or {})
        return LLMBackbone(str(base), **arguments)
    except (OSError, KeyError, TypeError, AttributeError, IndexError) as error:  # of a config with something odd in it
        raise ValueError(
            f"base={str(base)!r} could not be loaded. Give the Hub id of a decoder-only LLM (such as "
            f"'HuggingFaceTB/SmolLM2-135M'), a folder with its config.json and weights, or a .gguf file. ({error})"
        ) from error


def _consents(arguments: dict[str, Any]) -> bool:
    return bool((arguments.get("model_kwargs") or {}).get("trust_remote_code"))


def _demand_llm(base: str, model_kwargs: dict[str, Any]) -> None:
    """Check that it is an LLM by itself: of a model of sentence-transformers, only the LLM would be taken."""
    where = {key: model_kwargs[key] for key in ("token", "revision", "local_files_only") if key in model_kwargs}
    where["cache_folder"] = model_kwargs.get("cache_dir")
    if "subfolder" in model_kwargs or not is_sentence_transformer_model(base, **where):
        return
    raise ValueError(
        f"base={base!r} is a model of sentence-transformers: it has a modules.json. Its pooling and its prompts would "
        f"be lost, and untrained ones take their place. To train it further, load it: model = SentenceTransformer("
        f"{base!r}, trust_remote_code=True); or name it as 'start' in a configuration. To build another model of its "
        "LLM, save that by itself: model[0].model.save_pretrained(folder); model.tokenizer.save_pretrained(folder)."
    )
