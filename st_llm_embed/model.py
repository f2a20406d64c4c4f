"""``build_model``: the one place where backbone, pooling and prompts are joined into a plain SentenceTransformer; or,
by the recipes of several vectors and of sparse ones, into the host's MultiVectorEncoder or SparseEncoder.

A recipe (``recipes.py``) names what its paper fixes; every argument of the backbone and of the pooling can be
overridden by name.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
from peft import LoraConfig, TaskType
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base import BaseModel
from sentence_transformers.base.modules import Dense, Module, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize
from sentence_transformers.util import is_sentence_transformer_model
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import find_adapter_config_file

from st_llm_embed.heads import lm_head_layer
from st_llm_embed.losses.lm_head import logit_scale
from st_llm_embed.modules import LLMBackbone
from st_llm_embed.modules.adapters import check_peft, split_hub_arguments
from st_llm_embed.modules.attention_mode import check_decoder
from st_llm_embed.modules.first_layers import check_depth
from st_llm_embed.modules.special_tokens import drop_text_end, set_special_tokens
from st_llm_embed.recipes import RECIPES
from st_llm_embed.trust import check_base, check_data, check_no_code
from st_llm_embed.weights.gguf import unpack_gguf

# peft takes these for the experts' own weights, of whatever module they are.
EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
KERNEL_NAMES = {"dt_proj", "out_proj"}
NOT_OVERRIDDEN = {"model_name_or_path", "kwargs", "query_expansion"}
LENGTHS = ("max_seq_length", "query_length", "document_length")
# Of peft.LoraConfig, what has the effect that it says, whatever maps are adapted.
LORA_ARGUMENTS = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "init_lora_weights"),
    *("rank_pattern", "alpha_pattern", "bias", "modules_to_save"),
)


@overload
def build_model(
    base: str | Path, recipe: Literal["multi-vector"], *, lora: bool | Mapping[str, Any] = ..., **overrides: Any
) -> MultiVectorEncoder: ...


@overload
def build_model(
    base: str | Path, recipe: Literal["sparse"], *, lora: bool | Mapping[str, Any] = ..., **overrides: Any
) -> SparseEncoder: ...


@overload
def build_model(
    base: str | Path, recipe: str = ..., *, lora: bool | Mapping[str, Any] = ..., **overrides: Any
) -> SentenceTransformer: ...


def build_model(
    base: str | Path, recipe: str = "nv-embed", *, lora: bool | Mapping[str, Any] = False, **overrides: Any
) -> BaseModel:
    """Make a text-embedding model of a decoder-only LLM.

    Args:
        base: the LLM: a Hub id, a local folder, or a ``.gguf`` file.
        recipe: the name of the recipe, one of ``RECIPES``. Tokens that it adds (``llara-release``: 16) get embeddings
            that begin at the mean of the others, plus noise of a tenth of their standard deviation.
        lora: whether to train the LLM by the recipe's LoRA (``nv-embed``: r 16, alpha 32; LLaRA's: r 64, alpha 16;
            dropout 0.1 on every linear map of the layers; where there are experts, only on those outside of them and
            not in their place); or arguments of ``peft.LoraConfig``, such as ``{"r": 32, "lora_alpha": 64}``, over
            those of the recipe. What the recipe adds, tokens too, trains in full either way.
        **overrides: arguments of ``LLMBackbone`` (``attention``, ``num_layers``, ``max_seq_length``, ``model_kwargs``,
            ...) and of the recipe's pooling module (``num_latents``, ``head_dim``, ...).

    Returns:
        A SentenceTransformer of backbone, pooling and ``Normalize``, untrained where the recipe adds weights. By
        ``multi-vector`` a MultiVectorEncoder, whose projection is untrained; by ``sparse`` a SparseEncoder with a copy
        of the LLM's LM head.

    Raises:
        ValueError: for an unknown recipe or override, a base that cannot be found, one that is not a decoder-only LLM
            or is an embedding model already, ``lora=True`` where the recipe has none, unknown arguments of LoRA, or,
            by ``sparse``, an LLM without weights of an LM head.
        ImportError: for ``lora`` where peft is older than the installed transformers takes.
    """
    settings = _read_settings(recipe, lora, overrides)
    chosen = RECIPES[recipe]
    backbone = _load_backbone(base, settings.backbone)
    added_ids = _add_tokens(backbone, chosen.added_tokens)
    if added_ids and not backbone.add_eos:  # the recipe pools the last ones, which its prompts end in
        drop_text_end(backbone.tokenizer)
    _check_skiplist(backbone.tokenizer, settings.pooling)
    head = chosen.pooling(backbone.get_embedding_dimension(), **settings.pooling)
    modules = head if isinstance(head, list) else [head, Normalize()]
    if chosen.has_lm_head:
        modules = [_copy_lm_head(base, backbone, settings.backbone), *modules]
    model = chosen.model(
        modules=[backbone, *modules],
        prompts=chosen.prompts,
        default_prompt_name=chosen.default_prompt_name,
        similarity_fn_name=chosen.similarity,
    )
    if settings.lora is not None:
        add_lora(model, settings.lora, added_ids)
    return model


class _Settings(NamedTuple):
    backbone: dict[str, Any]
    pooling: dict[str, Any]
    lora: dict[str, Any] | None


def _read_settings(recipe: str, lora: bool | Mapping[str, Any], overrides: Mapping[str, Any]) -> _Settings:
    """The arguments of each part of a model: the recipe's, and those that are given in their place."""
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is unknown. Valid recipes: {', '.join(RECIPES)}.")
    chosen = RECIPES[recipe]
    lora_settings = None if lora is False else _lora_settings(recipe, lora)
    backbone_names = (_argument_names(LLMBackbone) | _argument_names(Transformer)) - NOT_OVERRIDDEN
    pooling_names = _argument_names(chosen.pooling) - {"embedding_dimension"}
    if unknown := sorted(set(overrides) - backbone_names - pooling_names):
        raise ValueError(
            f"build_model got unknown arguments {unknown}. The backbone takes {sorted(backbone_names)}; "
            f"{chosen.pooling.__name__} takes {sorted(pooling_names)}."
        )
    arguments = {**chosen.defaults, **overrides}
    backbone, pooling = (
        {name: value for name, value in arguments.items() if name in names}
        for names in (backbone_names, pooling_names)
    )
    return _Settings(backbone, pooling, lora_settings)


@dataclass(frozen=True)
class Outline:
    """What is known of a model without its weights.

    Args:
        tokenizer: the tokenizer, as the model's will be.
        lengths: the largest numbers of tokens, by ``LENGTHS``.
        prompts: the prompts that it has before training.
        default_prompt_name: the name of its default prompt.
        add_eos: whether every text ends with EOS.
        width: the width of its embeddings; None where it is not known.
        model: the class of the model.
        tied: whether its LLM's LM head is tied to the input embeddings, as far as is known.
    """

    tokenizer: PreTrainedTokenizerBase
    lengths: dict[str, int | None]
    prompts: dict[str, str]
    default_prompt_name: str | None
    add_eos: bool = False
    width: int | None = None
    model: type[BaseModel] = SentenceTransformer
    tied: bool = True


def outline_model(
    base: str | Path, recipe: str = "nv-embed", *, lora: bool | Mapping[str, Any] = False, **overrides: Any
) -> Outline | None:
    """Refuse what ``build_model`` would refuse, as far as that shows without loading any weights.

    Args:
        base, recipe, lora, **overrides: see ``build_model``.

    Returns:
        What the model's texts are tokenized by. None for a ``.gguf`` file or an adapter, of which less is known.

    Raises:
        ValueError, ImportError: see ``build_model``.
    """
    settings = _read_settings(recipe, lora, overrides)
    path = Path(base)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"base={str(base)!r} is no file.")
        return None
    with _naming_base(base):
        _check_base_folder(base, settings.backbone)
        kwargs = {name: settings.backbone.get(name) or {} for name in ("config_kwargs", "processor_kwargs")}
        where, _ = split_hub_arguments(settings.backbone.get("model_kwargs") or {})
        if find_adapter_config_file(str(base), **where) is not None:
            return None
        config = AutoConfig.from_pretrained(base, **{"trust_remote_code": False, **where, **kwargs["config_kwargs"]})
        tokenizer = AutoTokenizer.from_pretrained(
            settings.backbone.get("tokenizer_name_or_path") or base,
            **{"trust_remote_code": False, **where, **kwargs["processor_kwargs"]},
        )
    check_decoder(config)
    if settings.backbone.get("num_layers") is not None:
        check_depth(config, settings.backbone["num_layers"])
    add_eos = settings.backbone.get("add_eos", True)
    set_special_tokens(tokenizer, config.model_type, end=add_eos is True)
    chosen, text_config = RECIPES[recipe], config.get_text_config()
    _check_skiplist(tokenizer, settings.pooling)
    with torch.device("meta"):
        chosen.pooling(text_config.hidden_size, **settings.pooling)
    if chosen.has_lm_head and type(config) in AutoModel._model_mapping:
        _check_lm_head(config)
    if settings.lora is not None:
        check_lora(config, settings.lora)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in chosen.added_tokens])
    lengths = {name: settings.backbone.get(name) for name in LENGTHS}
    return Outline(
        tokenizer,
        {**lengths, "max_seq_length": lengths["max_seq_length"] or tokenizer.model_max_length},
        chosen.prompts,
        chosen.default_prompt_name,
        add_eos=bool(add_eos),
        width=text_config.hidden_size,
        model=chosen.model,
        tied=text_config.tie_word_embeddings,
    )


def check_lora(config: PretrainedConfig, settings: Mapping[str, Any]) -> None:
    """Check LoRA's arguments on an LLM without weights, if it is of transformers' own classes.

    Args:
        config: the configuration of the LLM.
        settings: the arguments of ``peft.LoraConfig``.

    Raises:
        ValueError: for arguments that peft refuses, and ``target_modules`` that the LLM has not.
    """
    if type(config) in AutoModel._model_mapping:
        with torch.device("meta"):
            _add_to_llm(AutoModel.from_config(config), settings)


def _check_skiplist(tokenizer: PreTrainedTokenizerBase, pooling: Mapping[str, Any]) -> None:
    if unknown := sorted(set(pooling.get("skiplist_words", ())) - tokenizer.get_vocab().keys()):
        raise ValueError(
            f"skiplist_words={unknown} are no tokens of the tokenizer. Spell them as its vocabulary does, a space "
            "before a word too: tokenizer.tokenize('a (b)') shows how."
        )


def _check_lm_head(config: PretrainedConfig) -> None:
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"recipe='sparse' weighs the vocabulary by an LM head, and transformers has no {config.model_type!r} "
            "with one. Take another LLM, or another recipe."
        )


def _copy_lm_head(base: str | Path, backbone: LLMBackbone, arguments: Mapping[str, Any]) -> Dense:
    """The LLM's LM head as a module after it, a copy even where it is tied to the input embeddings. What scales the
    logits is in its weights; a softcap, which keeps their order, is left out."""
    llm = backbone.model
    scale = logit_scale(llm.config)
    if llm.config.get_text_config().tie_word_embeddings:
        return lm_head_layer(scale * llm.get_input_embeddings().weight.detach(), None)
    _check_lm_head(llm.config)
    path, kwargs = Path(base), {"trust_remote_code": False, **(arguments.get("model_kwargs") or {})}
    of_gguf = {"gguf_file": path.name, "dtype": torch.float32} if path.suffix == ".gguf" else {}
    whole, loaded = AutoModelForCausalLM.from_pretrained(
        path.parent if of_gguf else base, output_loading_info=True, **{**kwargs, **of_gguf}
    )
    head = whole.get_output_embeddings()
    names = {name for name, module in whole.named_modules() if module is head}
    if head is None or any(key.rpartition(".")[0] in names for key in loaded["missing_keys"]):
        raise ValueError(
            f"base={str(base)!r} holds no weights of an LM head, of which recipe='sparse' makes the weights of the "
            "vocabulary. Give the causal LLM as it was published, or take another recipe."
        )
    bias = None if head.bias is None else scale * head.bias.detach()
    return lm_head_layer(scale * head.weight.detach(), bias)


def add_lora(model: BaseModel, settings: Mapping[str, Any], trained_ids: Sequence[int] = ()) -> None:
    """Add LoRA to a model's LLM: only it is trained, and the modules after the LLM.

    Args:
        model: the model.
        settings: the arguments of ``peft.LoraConfig``. Default of ``target_modules``: the linear maps of the layers.
        trained_ids: the tokens whose embeddings are trained in full.
    """
    _add_to_llm(model.transformers_model, settings, trained_ids)


def _add_to_llm(llm: PreTrainedModel, settings: Mapping[str, Any], trained_ids: Sequence[int] = ()) -> None:
    embeddings = llm.get_input_embeddings()
    name = next(name for name, module in llm.named_modules() if module is embeddings)
    trained_tokens = {"trainable_token_indices": {name: list(trained_ids)}} if trained_ids else {}
    targets = {"target_modules": _lora_targets(llm), **trained_tokens}
    llm.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, **{**targets, **settings}))


def _lora_settings(recipe: str, lora: bool | Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``LoraConfig``: the recipe's, and those that are given in their place."""
    check_peft()
    given = lora if isinstance(lora, Mapping) else {}
    if not given and RECIPES[recipe].lora is None:
        with_lora = ", ".join(name for name, other in RECIPES.items() if other.lora)
        raise ValueError(
            f"recipe={recipe!r} names no LoRA; {with_lora} do. Say which: lora={{'r': 16, 'lora_alpha': 32}}, or use "
            "model.add_adapter(peft.LoraConfig(...))."
        )
    for name in given.keys() - set(LORA_ARGUMENTS):
        nearest = [f" Did you mean {near!r}?" for near in get_close_matches(name, LORA_ARGUMENTS, n=1)]
        raise ValueError(
            f"lora has the argument {name!r}.{''.join(nearest)} It takes {', '.join(LORA_ARGUMENTS)}; for "
            "anything else use model.add_adapter(peft.LoraConfig(...))."
        )
    return {**(RECIPES[recipe].lora or {}), **given}


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
    """Add tokens to the LLM; those that it has already keep their embeddings. Gives the ids of all."""
    tokenizer, old_size = backbone.tokenizer, len(backbone.tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens], special_tokens=True)
    # An LLM may have more rows than its tokenizer has tokens.
    if len(tokenizer) > backbone.model.get_input_embeddings().num_embeddings:
        backbone.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if added := len(tokenizer) - old_size:
        weight = backbone.model.get_input_embeddings().weight.detach()
        std, mean = torch.std_mean(weight[:old_size].float(), dim=0)
        noise = torch.randn(added, len(mean), device=weight.device)
        weight[old_size : len(tokenizer)] = (mean + 0.1 * std * noise).to(weight.dtype)
    return tokenizer.convert_tokens_to_ids(tokens)


def _argument_names(module: type[Module] | Callable[..., list[Module]]) -> set[str]:
    return set(inspect.signature(module).parameters)


def _load_backbone(base: str | Path, arguments: dict[str, Any]) -> LLMBackbone:
    path = Path(base)
    if path.suffix == ".gguf":
        with tempfile.TemporaryDirectory() as folder:
            unpack_gguf(path, Path(folder), arguments.pop("num_layers", None))
            backbone = LLMBackbone(folder, **arguments)
        backbone.model.config._name_or_path = path.stem
        backbone.model.name_or_path = ""  # which no adapter could load: its base is saved with it
        return backbone
    with _naming_base(base):
        _check_base_folder(base, arguments)
        return LLMBackbone(str(base), **arguments)


@contextmanager
def _naming_base(base: str | Path) -> Iterator[None]:
    """Errors that name the base, and what one is."""
    try:
        yield
    except (OSError, KeyError, TypeError, AttributeError, IndexError) as error:  # of a config with something odd in it
        raise ValueError(
            f"base={str(base)!r} could not be loaded. Give the Hub id of a decoder-only LLM (such as "
            f"'HuggingFaceTB/SmolLM2-135M'), a folder with its config.json and weights, or a .gguf file. ({error})"
        ) from error


def _check_base_folder(base: str | Path, arguments: Mapping[str, Any]) -> None:
    """Check that it is an LLM by itself, and runs no code without consent."""
    path = Path(base)
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json", "modules.json")):
            raise FileNotFoundError(f"{path} has no config.json")
        check_data(path, pickles=True)  # of which transformers reads tensors only
        check_no_code(path, _consents(arguments))
        check_base(path, _consents(arguments))
    _check_llm(str(base), arguments.get("model_kwargs") or {})


def _consents(arguments: Mapping[str, Any]) -> bool:
    return bool((arguments.get("model_kwargs") or {}).get("trust_remote_code"))


def _check_llm(base: str, model_kwargs: dict[str, Any]) -> None:
    """Check that it is an LLM by itself: of a model of sentence-transformers, only the LLM would be taken."""
    hub_arguments: dict[str, Any] = {"cache_folder": model_kwargs.get("cache_dir")}
    hub_arguments |= {
        key: model_kwargs[key] for key in ("token", "revision", "local_files_only") if key in model_kwargs
    }
    if "subfolder" in model_kwargs or not is_sentence_transformer_model(base, **hub_arguments):
        return
    raise ValueError(
        f"base={base!r} is a model of sentence-transformers: it has a modules.json. Its pooling and its prompts would "
        "be lost, and untrained ones take their place. To train it further, load it: model = SentenceTransformer("
        f"{base!r}, trust_remote_code=True); or, in a configuration, model: {{load: {base}}}. To build another model "
        "of its LLM, save that by itself: model[0].model.save_pretrained(folder); "
        "model.tokenizer.save_pretrained(folder)."
    )
