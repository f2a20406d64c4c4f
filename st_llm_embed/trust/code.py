"""What would run if a folder were loaded: classes in ``modules.json``, an ``auto_map`` in any configuration,
activations, kernels of the Hub. Each file is read as the loaders read it, at every depth."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentence_transformers.util import import_from_string

from st_llm_embed.files import read_json, write_json
from st_llm_embed.modules import LatentAttentionPooling, LLMBackbone, PromptTokenPooling, reference
from st_llm_embed.trust.data import configurations, objects

STOCK = "sentence_transformers."
MODULES = {
    name: module
    for module in (LLMBackbone, LatentAttentionPooling, PromptTokenPooling)
    for name in (
        f"{module.__module__}.{module.__name__}",  # not sealed
        f"{module.__module__.rpartition('.')[2]}.{module.__name__}",
    )
}
# Of sentence-transformers' own those that load what is in their folder, and nothing else.
STOCK_MODULES = set(
    "Transformer Pooling Normalize Dense LayerNorm Dropout WeightedLayerPooling Router Asym StaticEmbedding BoW "
    "WordEmbeddings WordWeights CNN LSTM CLIPModel LogitScore MultiVectorMask SpladePooling MLMTransformer "
    "HierarchicalTokenPooling".split()
)
# The last is what cross-encoders before sentence-transformers 4 have.
ACTIVATIONS = ("activation_function", "activation_fn", "activation_fct", "sbert_ce_default_activation_function")
STOCK_TOKENIZERS = {"WhitespaceTokenizer", "PhraseTokenizer"}
ADAPTERS = {"LORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "HRA"}
# SHA-256 of what released versions shipped with models.
RELEASED = {
    "712c2cb8369bcfca1cd0f752198e97e47320c8e921f4bdb210ddfa547c598288": "attention_mode.py of 0.1.0",
    "0f31f4df51b57a52173dc0ae321cb627f546ec677b5d4e2060b7348c827f57c4": "latent_attention_pooling.py of 0.1.0",
    "1b5c350e682262c0a59aaccb6ab740fef08270c0de84df5f1b48f462f1465714": "llm_backbone.py of 0.1.0",
    "dffd82fa18279808bcd3f2aabcacb88ea644d389fa292fb5b0c1bb8409dcfe00": "prompt_token_pooling.py of 0.1.0",
}
# What sentence-transformers hands from its configurations to the loaders of transformers, and what may be in it.
HANDED_ON = ("model_kwargs", "processor_kwargs", "config_kwargs", "model_args", "tokenizer_args", "config_args")
HARMLESS = {
    *("use_cache", "is_causal", "add_pooling_layer", "low_cpu_mem_usage", "legacy", "use_fast", "do_lower_case"),
    *("add_bos_token", "add_eos_token", "add_prefix_space", "max_length", "model_max_length"),
    "clean_up_tokenization_spaces",
    *("attn_implementation", "dtype", "torch_dtype", "padding", "padding_side", "truncation", "truncation_side"),
    *(f"{kind}_token" for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")),
}


def code_in(root: Path) -> dict[str, str]:
    """What loading ``root`` would run, besides the hosts and this package: the reason, by file.

    Without consent the hosts refuse or pass over some of it; another reader who gives them
    ``trust_remote_code=True``, as a folder with classes of its own asks for, would run all of it.
    """
    reasons: dict[str, str] = {}
    files = [file for file in root.rglob("*") if file.is_file()]
    contents = dict(configurations(files))
    has_classes = has_code(root)
    for entry in contents.get(root / "modules.json", []):
        if reason := _unknown_class(root, entry["type"]):
            reasons["modules.json"] = reason
    if has_classes:
        known_files = _known_files(with_released="adapter_config.json" not in {file.name for file in files})
        unknown = [file.name for file in root.glob("*.py") if _hash(file) not in known_files]
        reasons |= dict.fromkeys(unknown, "it is not a file that this package ships")
    for file, content in contents.items():
        name = str(file.relative_to(root))
        for reason in _named_code(file.name, content, has_classes):
            reasons.setdefault(name, reason)
    return reasons


def check_no_code(root: Path, trust_remote_code: bool) -> bool:
    """Check that loading ``root`` runs no code that is not known, or that the caller consents to it.

    Returns:
        Whether there is such code.

    Raises:
        ValueError: naming the files and the reasons.
    """
    reasons = code_in(root)
    if reasons and not trust_remote_code:
        listed = "; ".join(f"{name!r}: {reason}" for name, reason in sorted(reasons.items()))
        raise ValueError(
            f"{root} runs code that this version of the package does not ship. {listed}. Read it; then pass "
            "trust_remote_code=True (--trust-remote-code) to run it."
        )
    return bool(reasons)


def has_code(root: Path) -> bool:
    """Does loading this folder run module code of its own? One without modules.json gets the host's."""
    file = root / "modules.json"
    return file.is_file() and any(not entry["type"].startswith(STOCK) for entry in read_json(file))


def forget_code(file: Path) -> None:
    """Drop from a configuration what names the code of its LLM or tokenizer."""
    write_json(file, _without_code(read_json(file)))


def _without_code(content: Any) -> Any:
    """A configuration without what names the code of its LLM or tokenizer."""
    if isinstance(content, dict):
        return {key: _without_code(value) for key, value in content.items() if key != "auto_map"}
    return [_without_code(value) for value in content] if isinstance(content, list) else content


def _unknown_class(root: Path, name: str) -> str | None:
    """Why a class of modules.json is not known, if it is not."""
    if name.startswith(STOCK):
        return None if _is_stock(name, STOCK_MODULES) else f"{name!r} is no module of sentence-transformers"
    if name not in MODULES:
        return f"{name!r} is not one of this package's classes"
    file = root / f"{name.partition('.')[0]}.py"
    if name.count(".") == 1 and not file.is_file():
        return f"{name!r} is in no file of the folder"
    return None


def _is_stock(name: str, classes: set[str]) -> bool:
    """Does a dotted name lead to one of these classes of sentence-transformers?"""
    if not name.startswith(STOCK) or name.rpartition(".")[2] not in classes:
        return False
    try:
        imported = import_from_string(name)
    except (ImportError, AttributeError, ValueError, TypeError):
        return False
    return isinstance(imported, type) and imported.__module__.startswith(STOCK)


def _known_files(with_released: bool) -> set[str]:
    shipped = {_hash(file) for file in Path(reference.__file__).parent.glob("*.py")}
    # Released code ran that of an adapter's base.
    return shipped | set(RELEASED) if with_released else shipped


def _named_code(name: str, content: Any, has_classes: bool) -> Iterator[str]:
    """The reasons why a configuration leads to code.

    Args:
        name: the name of the configuration's file.
        content: the configuration.
        has_classes: whether the model has classes of its own, so that loading it needs trust_remote_code, by which the
            hosts also run what ``auto_map`` names. Else they pass over it where they know the model's type.
    """
    for holder in objects(content):
        for key, value in holder.items():
            if key == "trust_remote_code" and value:
                yield "it asks for trust_remote_code"
            elif key in ("auto_map", "custom_pipelines") and value and has_classes:
                yield f"{key} names code of the model's own"
            elif key in ACTIVATIONS and not _is_activation(value):
                yield f"{key}={value!r} is no activation of torch.nn"
            elif key.strip("_").startswith(("attn_implementation", "experts_implementation")):
                kinds = value.values() if isinstance(value, dict) else [value]
                if any(isinstance(kind, str) and "/" in kind for kind in kinds):
                    yield f"{key}={value!r} is a kernel of the Hub"
            elif key in HANDED_ON and isinstance(value, dict):
                if others := sorted(name for name, setting in value.items() if not _is_harmless(name, setting)):
                    yield f"{key} has {', '.join(map(repr, others))}, which may name what the loaders read or run"
    if not isinstance(content, dict):
        return
    if name == "router_config.json" or "types" in content:
        types = content.get("types")
        for kind in types.values() if isinstance(types, dict) else []:
            if not (isinstance(kind, str) and (kind in MODULES or _is_stock(kind, STOCK_MODULES))):
                yield f"types has {kind!r}, which is no module of sentence-transformers"
    for key in ("tokenizer_name_or_path", "audio_tokenizer"):
        if content.get(key):
            yield f"{key} leads to another place"
    if name == "wordembedding_config.json" and not _is_stock(str(content.get("tokenizer_class")), STOCK_TOKENIZERS):
        yield f"tokenizer_class={content.get('tokenizer_class')!r} is none of sentence-transformers"
    if name == "adapter_config.json":
        for key in ("megatron_config", "tokenizer_kwargs", "corda_config", "adapters"):
            if content.get(key):
                yield f"{key} leads to a module or a file of its choice"
        if content.get("peft_type", "LORA") not in ADAPTERS:
            yield f"peft_type={content['peft_type']!r} is none of {', '.join(sorted(ADAPTERS))}"


def _is_harmless(name: str, value: Any) -> bool:
    """May a configuration hand this to a loader?"""
    return name in HARMLESS and not isinstance(value, list | dict)


def _is_activation(value: Any) -> bool:
    """A plain name, of transformers' own, or a class of torch.nn."""
    if not isinstance(value, str) or "." not in value:
        return True
    module, _, name = value.rpartition(".")
    return (module == "torch.nn" or module.startswith("torch.nn.modules.")) and name.isidentifier()


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
