"""All keys of a configuration, from the types that check it: a JSON schema for editors, and ``KEYS.md`` for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from st_llm_embed.model import LENGTHS, LORA_ARGUMENTS, build_model
from st_llm_embed.modules import LatentAttentionPooling, LLMBackbone, PromptTokenPooling
from st_llm_embed.recipes import RECIPES
from st_llm_embed.training.run_config import (
    COLUMNS,
    LIMITS,
    LORA_OR_NOT,
    MINE,
    MNTP_LOSS,
    MODELS,
    OF_PRETEXT,
    PRETEXT_LOSS,
    READS,
    RUN,
    STAGE,
    TASK,
    Evaluation,
    Sealing,
)
from st_llm_embed.training.schema import Part, fields_of, part
from st_llm_embed.training.training_args import OF_TASKS, LLMEmbedTrainingArguments

HEAD = """# All keys of a configuration

By `st-llm-embed schema --markdown`, from the types that check a configuration; a test compares them. The guide is
[README.md](README.md). `st-llm-embed schema` prints the JSON schema, with the arguments of the installed host
libraries too: save it as `st-llm-embed.schema.json`, and begin a configuration with
`# yaml-language-server: $schema=st-llm-embed.schema.json`, for completion and checks in the editor.

Paths are relative to the file, `~` is the home folder. A key's path, such as `stages.blended.arguments.max_steps`, is
what errors name and `--set` takes.
"""
NOT_OF_BUILDERS = {"read", "mine", "columns", *TASK}
WORDS = {
    **{"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"},
    **{"object": "mapping", "null": "null", "array": "list"},
}


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RUN.model_json_schema()}


def reference() -> str:
    """All keys that are this package's own, as Markdown."""
    of_base = fields_of(build_model, kinds={"lora": LORA_OR_NOT})
    backbone = fields_of(LLMBackbone, without=("model_name_or_path",), limits=LIMITS)
    lengths = {name: field for name, field in _fields(MODELS["load"]).items() if name in LENGTHS}
    latent, prompt_token = (
        fields_of(pooling, without=("embedding_dimension",), limits=LIMITS)
        for pooling in (LatentAttentionPooling, PromptTokenPooling)
    )
    arguments = fields_of(LLMEmbedTrainingArguments, only=OF_TASKS, limits=LIMITS)
    builders = {name: _fields(kind) for name, kind in READS.items() if not name.startswith("load_")}
    parts = [
        HEAD,
        _section("The run", _fields(RUN)),
        _section("stages", _fields(STAGE), "A list; each stage has"),
        _section("model: of a base", of_base),
        f"`recipe` is one of {_listed(RECIPES)}. `lora` takes true, or {_listed(LORA_ARGUMENTS)} of "
        "`peft.LoraConfig`, over those of the recipe. Besides, of the backbone, where a recipe may have other "
        "defaults:\n",
        _table(backbone | lengths),
        "Of the pooling of `nv-embed`:\n",
        _table(latent),
        "Of the pooling of `llara` and `llara-release`:\n",
        _table(prompt_token),
        "And those of sentence-transformers' `Transformer` (`model_kwargs`, `processor_kwargs`, ...) and, where the "
        "recipe has it, `Pooling` (`pooling_mode`, `include_prompt`).\n",
        _section("model: a trained one", _fields(MODELS["load"])),
        _section("arguments", arguments, "Those of `SentenceTransformerTrainingArguments`, and"),
        _section("loss: of a pretext stage", OF_PRETEXT),
        "With `objective: ebae-ebar` besides:\n",
        _table(PRETEXT_LOSS),
        "With `objective: mntp` besides:\n",
        _table(MNTP_LOSS),
        "## loss: of another stage\n\nThose of sentence-transformers' `MatryoshkaLoss`: `matryoshka_dims`, "
        "`matryoshka_weights`, ...\n",
        _section("data: settings of a task", COLUMNS | TASK, "Beside the arguments of its builder:"),
        _section("data: mine", _fields(MINE)),
        *(
            _section(
                f"data: read: {name}", {key: field for key, field in fields.items() if key not in NOT_OF_BUILDERS}
            )
            for name, fields in builders.items()
        ),
        _section("seal", fields_of(Sealing)),
        _section("evaluate", fields_of(Evaluation, limits=LIMITS)),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _fields(kind: type[Part]) -> dict[str, Any]:
    return {name: (field.annotation, field) for name, field in kind.model_fields.items()}


def _section(title: str, fields: Mapping[str, Any], introduction: str = "") -> str:
    return "\n".join([f"## {title}\n", *([f"{introduction}\n"] if introduction else []), _table(fields)])


def _table(fields: Mapping[str, Any]) -> str:
    lines = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    kind = part("table", fields)
    properties = kind.model_json_schema()["properties"]
    for name, field in kind.model_fields.items():
        default = (
            "needed" if field.is_required() else "" if field.default is None else f"`{json.dumps(field.default)}`"
        )
        meaning = (field.description or "").replace("``", "`").replace("|", "\\|")
        lines.append(f"| `{name}` | {_type(properties[name])} | {default} | {meaning} |")
    return "\n".join([*lines, ""])


def _type(schema: Mapping[str, Any]) -> str:
    """A type of a JSON schema in words."""
    options = schema.get("anyOf") or schema.get("oneOf")
    if options:
        words = dict.fromkeys(_type(option) for option in options)
        return " or ".join(word for word in words if word != "null")
    if "$ref" in schema or "discriminator" in schema:
        return "mapping"
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return " or ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in values)
    kind = WORDS.get(schema.get("type", ""), "any")
    if kind == "list" and "items" in schema:
        return f"list of {_type(schema['items'])}"
    return kind


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
