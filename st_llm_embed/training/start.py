"""What a stage begins with: an untrained model of a base, a trained model as it is, or the stage before's.

A stage may have another LoRA than the one before. LoRA that it has not is merged into the LLM, and then the stage's
own is added: full training after LoRA, LoRA after full training, LoRA of another rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base import BaseModel
from transformers import AutoConfig, AutoTokenizer, set_seed

from st_llm_embed.files import read_json
from st_llm_embed.losses.pretext_prompts import read_prompts
from st_llm_embed.losses.token_masking import mask_id_of
from st_llm_embed.model import LENGTHS, Outline, add_lora, build_model, check_lora, outline_model
from st_llm_embed.modules import LLMBackbone
from st_llm_embed.modules.adapters import ADAPTER_CONFIG
from st_llm_embed.modules.special_tokens import special_ids
from st_llm_embed.recipes import RECIPES
from st_llm_embed.tasks import Task, encoding_prompts
from st_llm_embed.teaching.alignment import unfitted, with_projection, without_length
from st_llm_embed.training.configuration import Given
from st_llm_embed.training.run_config import OF_PRETEXT, RunConfig, Stage, read_run
from st_llm_embed.training.stage_data import PRETEXT, task_of
from st_llm_embed.trust import check_base, check_no_code, fetch, load_any, loading, model_class
from st_llm_embed.weights.merging import has_adapter, merge_adapter
from st_llm_embed.weights.saved import load_saved


def begin(config: RunConfig, number: int, previous: Path | None, widths: Sequence[int]) -> BaseModel:
    """The model that a stage trains.

    Args:
        config: the configuration.
        number: the stage, from 0.
        previous: the folder of the model that the stage before left; None for a model of the same parts that is not
            trained yet.
        widths: the width of the teacher's vectors in each stage.
    """
    set_seed(config.seed)
    stage = config.stages[number]
    settings = config.model_of(stage)
    before = config.model_of(config.stages[number - 1]) if number else settings
    model = _load(settings) if "load" in settings else build_model(**{**settings, "lora": before.get("lora", False)})
    if "load" in settings:
        model = _with_lora(model, before.get("lora"), None, is_untouched=True)
    for earlier in range(number):
        if config.projects(earlier):
            model = unprojected(model, widths[earlier])
    if previous is not None:
        load_saved(model, previous)
    if settings.get("lora") != before.get("lora"):
        recipe = None if "load" in settings else settings.get("recipe", "nv-embed")
        model = _with_lora(model, settings.get("lora", False), recipe, is_untouched=False)
    if config.name is not None:
        model.model_card_data.model_name = config.name
    return model


def begin_run(config: str | Path | Mapping[str, Any], assignments: Mapping[str, Any]) -> BaseModel:
    """The model that a run begins with, under the prompts of all its tasks: to compare the trained one with.

    Args:
        config, assignments: see ``train_stages``.

    Raises:
        ValueError: for a configuration that says something unknown or impossible.
    """
    given = Given.read(config, assignments)
    settings = read_run(given)
    with given.naming("model"):
        outline_stage(settings, settings.stages[0])
    tasks = []
    for name, data in settings.data.items():
        with given.naming("data", name):
            tasks += [task_of(name, data)] if data["read"] != PRETEXT else []
    model = begin(settings, 0, None, [])
    model.prompts.update(encoding_prompts(tasks, model.prompts, model.default_prompt_name))
    return model


def unprojected(model: SentenceTransformer, width: int) -> SentenceTransformer:
    """The model with a projection of so many dimensions whose weights are still to come."""
    pooled = without_length(model)
    return with_projection(pooled, unfitted(pooled.get_embedding_dimension(), width))


def _load(settings: Mapping[str, Any]) -> BaseModel:
    model = load_any(
        fetch(settings["load"], settings.get("revision")),
        settings.get("trust_remote_code", False),
        model_kwargs=settings.get("model_kwargs") or {},
    )
    for name in LENGTHS:
        if settings.get(name) is not None:
            setattr(model if name == "max_seq_length" else model[0], name, settings[name])
    if has_adapter(model):  # which is loaded frozen
        for name, parameter in model.transformers_model.named_parameters():
            parameter.requires_grad_("lora_" in name or "trainable_tokens" in name or "modules_to_save" in name)
    return model


def _with_lora(
    model: BaseModel, lora: bool | Mapping[str, Any] | None, recipe: str | None, is_untouched: bool
) -> BaseModel:
    """A model with this LoRA in place of the one that it has; None leaves it as it is.

    Args:
        model: the model.
        lora: the arguments of ``peft.LoraConfig``.
        recipe: the recipe of a model that was built, for its LoRA and its tokens.
        is_untouched: whether the model's weights are those that it was loaded with.

    Raises:
        ValueError: if the adapter would be saved without the LLM that it is for.
    """
    if lora is None:
        return model
    if has_adapter(model):
        model, is_untouched = merge_adapter(model), False
    if lora is not False:
        if isinstance(model[0], LLMBackbone):
            model.transformers_model.name_or_path = ""  # its weights are not those of that name: it is saved beside
        elif is_untouched:  # its adapter names the folder that it was loaded from, which shall be found from anywhere
            name = model.transformers_model.name_or_path
            model.transformers_model.name_or_path = str(Path(name).resolve()) if Path(name).is_dir() else name
        else:
            raise ValueError(
                f"lora comes after other training, and a {type(model[0]).__name__} saves no base with its adapter. "
                "Say lora from the first stage on, or train in full."
            )
        of_recipe = (RECIPES[recipe].lora if recipe else None) or {}
        add_lora(model, {**of_recipe, **({} if lora is True else lora)}, _added_ids(model, recipe))
    return model


def _added_ids(model: BaseModel, recipe: str | None) -> list[int]:
    return model.tokenizer.convert_tokens_to_ids(RECIPES[recipe].added_tokens) if recipe else []


def outline_stage(config: RunConfig, stage: Stage) -> Outline | None:
    """What is known of a stage's model without its weights, once what it refuses is refused.

    Raises:
        ValueError, OSError, ImportError: for a base that is no LLM, a model that is none of sentence-transformers',
            and arguments that are not theirs.
    """
    settings = config.model_of(stage)
    return _outline_loaded(settings) if "load" in settings else outline_model(**settings)


def _outline_loaded(settings: Mapping[str, Any]) -> Outline | None:
    source, trusts = settings["load"], settings.get("trust_remote_code", False)
    if Path(source).is_dir() and "revision" in settings:
        raise ValueError(f"revision={settings['revision']!r} is of a Hub repository, and {source} is a folder here.")
    try:
        root = fetch(source, settings.get("revision"))
    except OSError as error:
        raise ValueError(
            f"load={source!r} is no folder, and cannot be read from the Hub: {str(error).splitlines()[0]}"
        ) from error
    if not (root / "modules.json").is_file():
        raise ValueError(
            f"load={source!r} is no model of sentence-transformers: it has no modules.json. Of an LLM, a model is "
            f"built: model: {{base: {source}, recipe: nv-embed}}."
        )
    check_no_code(root, trusts)
    check_base(root, trusts)
    first = root / read_json(root / "modules.json")[0]["path"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(first, trust_remote_code=trusts)
    except (OSError, ValueError, KeyError):  # of modules that tokenize otherwise
        return None
    if settings.get("lora") and not (first / ADAPTER_CONFIG).is_file():
        with loading(root):
            config = AutoConfig.from_pretrained(first, trust_remote_code=trusts)
        check_lora(config, settings["lora"])
    whole, saved = (
        read_json(file) if file.is_file() else {}
        for file in (root / "config_sentence_transformers.json", first / "sentence_bert_config.json")
    )
    lengths = {name: settings.get(name, saved.get(name)) for name in LENGTHS}
    prompts = whole.get("prompts") or {}
    return Outline(tokenizer, lengths, prompts, whole.get("default_prompt_name"), model=model_class(root))


def check_stage(stage: Stage, outline: Outline, tasks: Sequence[Task]) -> None:
    """Check that each prompt of a stage leaves room for text, and that its loss fits the LLM.

    Args:
        stage: the stage.
        outline: its model.
        tasks: its tasks; none in a pretext stage.

    Raises:
        ValueError: naming the prompt, its tokens and the length; or the setting of the loss.
    """
    if not tasks:
        if stage.masks:
            mask_id_of(outline.tokenizer, stage.loss.get("mask_token"))
        else:
            settings = {key: stage.loss[key] for key in stage.loss if key not in (*OF_PRETEXT, "form")}
            read_prompts(outline.tokenizer, outline.add_eos, outline.lengths["max_seq_length"], **settings)
        if not outline.tied and "lm_head" not in stage.loss:
            raise ValueError("the LLM does not tie its LM head to its input embeddings. Say loss: {lm_head: base}.")
        return
    if outline.model is not SentenceTransformer and "matryoshka_dims" in stage.loss:
        raise ValueError(
            f"has matryoshka_dims, and a {outline.model.__name__} has no vector that could be cut short. Leave it out."
        )
    widest = max(stage.loss.get("matryoshka_dims", [0]))
    if outline.width is not None and widest > outline.width:
        raise ValueError(f"has matryoshka_dims of {widest}, and the model's vectors {outline.width} dimensions.")
    default, columns = outline.default_prompt_name, ("anchor", "positive")
    prompts = outline.prompts | encoding_prompts(tasks, outline.prompts, default)
    for task in tasks:
        sides = task.column_sides(columns)
        for column, prompt in task.column_prompts(columns, prompts, default).items():
            _check_room(outline, prompt, f"{sides.get(column, '')}_length")


def _check_room(outline: Outline, prompt: str, length: str) -> None:
    name = length if outline.lengths.get(length) else "max_seq_length"
    longest = outline.lengths[name]
    before, after = special_ids(outline.tokenizer)
    parts = [part for part in prompt.partition("{text}")[::2] if part]
    tokens = [outline.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    around = len(before) + len(after) + sum(map(len, tokens))
    if longest is not None and around >= longest:
        raise ValueError(
            f"the prompt {prompt!r} takes {around} tokens with BOS and EOS, which leaves no room for text within "
            f"{name}={longest}. Raise {name}, or shorten the prompt."
        )
