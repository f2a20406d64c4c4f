"""What the files of a published model say of it, for servers that have no sentence-transformers to load it by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BACKBONE = "llm_backbone.LLMBackbone"
POOLINGS = ("latent_attention_pooling.LatentAttentionPooling", "prompt_token_pooling.PromptTokenPooling")
STOCK = "sentence_transformers."
# The arguments that a module has where its saved settings do not say.
DEFAULTS: dict[str, dict[str, Any]] = {
    "LLMBackbone": {"attention": "bidirectional", "window": None, "add_eos": True, "instruction_mask": "exact"},
    "LatentAttentionPooling": {"num_heads": 8, "mlp": "geglu", "include_prompt": False, "normalize": False},
    "PromptTokenPooling": {"num_tokens": 1},
    "Pooling": {"pooling_mode": "mean", "include_prompt": True},
    "Dense": {"bias": True, "use_residual": False},
}


@dataclass(frozen=True)
class Folder:
    """A published model.

    Args:
        backbone: the settings of ``LLMBackbone``.
        pooling: the class name of the pooling module.
        pooling_path: the sub-folder of the pooling module.
        pooling_config: its settings.
        dense: the sub-folders and settings of the ``Dense`` modules after it.
        normalize: whether ``Normalize`` comes last.
        prompts: the saved prompts by name.
        default_prompt_name: the prompt that ``encode`` uses unless told otherwise.
        tokenizer_config: the settings of the tokenizer.
    """

    backbone: dict[str, Any]
    pooling: str
    pooling_path: str
    pooling_config: dict[str, Any]
    dense: list[tuple[str, dict[str, Any]]]
    normalize: bool
    prompts: dict[str, str]
    default_prompt_name: str | None
    tokenizer_config: dict[str, Any]


def read_folder(read: Callable[[str], Any]) -> Folder:
    """Read the settings of a published model.

    Args:
        read: gives the content of a JSON file by its path in the folder, or None where there is no such file.

    Raises:
        ValueError: for modules other than ``LLMBackbone``, one pooling, any number of ``Dense`` and one ``Normalize``,
            in this order, or settings of theirs that are not served.
    """

    def settings(file: str, module: str | None = None) -> dict[str, Any]:
        content = read(file)
        if not isinstance(content, dict):
            raise ValueError(f"The model has no {file}. Copy or upload its whole folder.")
        return {**DEFAULTS[module], **content} if module else content

    modules = [(".".join(_parts(entry["type"])), entry["path"]) for entry in read("modules.json") or []]
    names = [name for name, _ in modules]
    normalize = names[-1:] == ["Normalize"]
    dense = modules[2:-1] if normalize else modules[2:]
    known = names[:1] == [BACKBONE] and len(names) > 1 and names[1] in (*POOLINGS, "Pooling")
    if not known or any(name != "Dense" for name, _ in dense):
        raise ValueError(
            f"modules.json names {names}. What is served is {BACKBONE}, a pooling ({', '.join(POOLINGS)} or "
            "sentence-transformers' Pooling), then its Dense and Normalize."
        )
    sentence_transformers = settings("config_sentence_transformers.json")
    backbone = settings("sentence_bert_config.json", "LLMBackbone")
    if backbone.get("query_length") or backbone.get("document_length"):
        raise ValueError(
            "Queries and documents have lengths of their own in sentence_bert_config.json (query_length, "
            "document_length), which a server cannot tell apart. Save the model with one max_seq_length."
        )
    backbone["window"] = backbone["window"] or ("keep" if backbone["attention"] == "causal" else "full")
    pooling = names[1].rpartition(".")[2]
    return Folder(
        backbone=backbone,
        pooling=pooling,
        pooling_path=modules[1][1],
        pooling_config=settings(f"{modules[1][1]}/config.json", pooling),
        dense=[(path, settings(f"{path}/config.json", "Dense")) for _, path in dense],
        normalize=normalize,
        prompts=sentence_transformers.get("prompts") or {},
        default_prompt_name=sentence_transformers.get("default_prompt_name"),
        tokenizer_config=settings("tokenizer_config.json"),
    )


def _parts(reference: str) -> list[str]:
    """A stock class's name; file and name of one that was shipped with the model."""
    parts = reference.split(".")
    return parts[-1:] if reference.startswith(STOCK) else parts[-2:]
