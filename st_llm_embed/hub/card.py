"""The part of a model card that can be read off the model: how it was made of which LLM, and how to use it.

sentence-transformers writes the rest (metadata, data sets, losses, evaluations, versions); this part goes before its
"Model Details". The text is in ``model_card_template.md``.
"""

from __future__ import annotations

import importlib.resources
import json
import logging
import re
from pathlib import Path

from huggingface_hub import ModelCard, metadata_load, metadata_save
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base import BaseModel
from sentence_transformers.base.model_card import generate_model_card
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from yaml import YAMLError

from st_llm_embed.files import written_beside
from st_llm_embed.hub.engine_keys import engines
from st_llm_embed.modules.adapters import ADAPTER_CONFIG
from st_llm_embed.tasks import OF_DOCUMENTS
from st_llm_embed.weights.export import attention_of

logger = logging.getLogger(__name__)
HEADING = "## What this is"
TRAINING = "## How it was trained"
DETAILS = "## Model Details"
NV_EMBED = "by the recipe of [NV-Embed](https://arxiv.org/abs/2405.17428)"
LLARA = "by the recipe of [LLaRA](https://arxiv.org/abs/2312.15503)"
POOLED = {
    "mean": 'mask = batch["attention_mask"].unsqueeze(-1)\nembeddings = (states * mask).sum(dim=1) / mask.sum(dim=1)',
    "lasttoken": 'last = batch["attention_mask"].cumsum(dim=1).argmax(dim=1)\n'
    "embeddings = states[torch.arange(len(last)), last]",
}
# In the host's list of all training arguments: places and names that are this machine's or its owner's.
PRIVATE_ARGUMENTS = re.compile(r"^- `(hub_\w+|run_name|project|\w+_dir|resume_from_checkpoint)`: .*\n", re.MULTILINE)
KINDS = {
    "SentenceTransformer": "a text-embedding model",
    "MultiVectorEncoder": "a late-interaction model",
    "SparseEncoder": "a sparse-embedding model",
}
HEADS = {
    "MultiVectorEncoder": (
        "for [late interaction](https://arxiv.org/abs/2004.12832)",
        "none: each token has a vector",
    ),
    "SparseEncoder": (
        "by [SPLADE](https://arxiv.org/abs/2109.10086) over its LM head",
        "the {pooling_strategy} over the text",
    ),
}
NO_ENGINES = (
    "| vLLM, TEI, ONNX, llama.cpp | refuse it | they give one dense vector for a text |\n"
    "| another class of sentence-transformers | no | it converts the model, to one that nobody trained |"
)
EXAMPLES = ["How do I parse command line arguments?", "argparse parses command lines.", "A cat sat on the mat."]
PLAIN = """Without sentence-transformers:

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}").eval()
texts = [{prompt!r} + "how do I parse command line arguments?", "argparse: command-line parsing library"]
batch = tokenizer(texts, padding=True, truncation=True, max_length={longest}, return_tensors="pt")
with torch.no_grad():
    states = model(**batch).last_hidden_state
{pooled}
{normalized}print(embeddings @ embeddings.T)
```"""


def state_card(model: BaseModel, name: str | None = None, license: str | None = None) -> None:
    """Give the model's card a name, its title, and a licence."""
    if name:
        model.model_card_data.model_name = name
    if license:
        model.model_card_data.set_license(license)


def inherit_license(model: BaseModel) -> None:
    """Give the model's card the licence that its base's card names, if its own names none."""
    card = model.model_card_data
    base = card.base_model or model.transformers_model.config._name_or_path
    if card.license is not None or not base:
        return
    try:
        if Path(base).is_dir():
            card.license = (metadata_load(Path(base) / "README.md") or {}).get("license")
        else:
            card.license = ModelCard.load(base).data.license
    except (OSError, ValueError, YAMLError):  # no card, no such repository, no network, a card that cannot be read
        return


def finish_card(file: Path, model: BaseModel, section: str, has_code: bool, samples: bool = False) -> None:
    """Put this package's part and ``section`` into the host's card, and make the card's own snippet one that loads.

    Unless ``samples`` says so, no row of the training data stays in it.

    A model that was loaded and not trained brings the card that it had, and keeps it, but for its name, licence and
    languages; unless its metadata cannot be read, which the Hub would refuse.
    """
    try:
        metadata_load(file)
    except (ValueError, YAMLError) as error:
        logger.warning(f"The model's card has metadata that cannot be read, so it gets a new one. ({error})")
        file.write_text(generate_model_card(model), encoding="utf-8")
    head, heading, details = file.read_text(encoding="utf-8").partition(DETAILS)
    if HEADING not in head:
        title, training, stages = head.partition(TRAINING)
        head = f"{title}{describe(model, has_code, file.parent)}\n\n{training}{stages}" + (
            f"{section.strip()}\n\n" if section else ""
        )
    kind = model.model_type
    if has_code:
        details = re.sub(rf'({kind}\("[^"]+")\)', r"\1, trust_remote_code=True)", details)
    card = model.model_card_data
    stated = {key: value for key in ("language", "license") if (value := getattr(card, key))}
    text = head + heading + details
    if card.model_name:
        text = re.sub(r"^# .*$", lambda _: f"# {card.model_name}", text, count=1, flags=re.MULTILINE)
    shown = re.search(rf'{kind}\("([^"]+)"', details)  # as the host wrote it
    placeholder = model._model_card_model_id_placeholder
    for name in {placeholder, *(shown.groups() if shown else ())}:
        text = text.replace(f'"{name}"', f'"{card.model_id or placeholder}"')
    file.write_text(PRIVATE_ARGUMENTS.sub("", text if samples else without_samples(text)), encoding="utf-8")
    metadata = metadata_load(file) or {}
    left_out = set() if samples else {"widget"} & metadata.keys()
    if left_out or not stated.items() <= metadata.items():
        metadata_save(file, {key: value for key, value in {**metadata, **stated}.items() if key not in left_out})


def without_samples(card: str) -> str:
    """A card without the training texts that sentence-transformers shows: tables of samples, and texts of the usage.

    Its metadata have them too, as ``widget``.
    """
    card = re.sub(r"^\* Samples:\n(?:[ |].*\n)+", "", card, flags=re.MULTILINE)
    texts = {"sentences": EXAMPLES, "queries": EXAMPLES[:1], "documents": EXAMPLES[1:]}
    for name, examples in texts.items():
        written = "".join(f"    {text!r},\n" for text in examples)
        card = re.sub(rf"^{name} = \[\n(?:    .*\n)+?\]$", f"{name} = [\n{written}]", card, flags=re.MULTILINE)
    return re.sub(r"^# tensor\(.*\n(?:#  .*\n)*", "", card, flags=re.MULTILINE)


def record_training(file: Path, stages: list[dict[str, str]], start: Path | None = None) -> None:
    """Put a table of all training stages into the host's card, which knows of the last one only.

    Args:
        file: the card.
        stages: a row of the table for each stage, all with the same keys.
        start: the card of the model that the stages went on from, whose table comes first.
    """
    head, heading, details = file.read_text(encoding="utf-8").partition(DETAILS)
    table = [f"| {' | '.join(row)} |" for row in (stages[0], ["---"] * len(stages[0]))]
    if start is not None and start.is_file():
        earlier = start.read_text(encoding="utf-8").partition(TRAINING)[2].partition(DETAILS)[0]
        table += [line for line in earlier.splitlines() if line.startswith("| ")][2:]
    table += [f"| {' | '.join(stage.values())} |" for stage in stages]
    rows = "\n".join(table)
    file.write_text(f"{head}{TRAINING}\n\n{rows}\n\n{heading}{details}", encoding="utf-8")


def put_section(file: Path, section: str) -> None:
    """Put a section into a card, before the host's part, or in place of the one with its heading."""
    heading = re.escape(section.partition("\n")[0])
    text = file.read_text(encoding="utf-8")
    text = re.sub(rf"^{heading}\n.*?(?=^## |\Z)", "", text, count=1, flags=re.MULTILINE | re.DOTALL)
    head, details, rest = text.partition(DETAILS)
    with written_beside(file) as staged:
        staged.write_text(f"{head.rstrip()}\n\n{section.strip()}\n\n{details}{rest}", encoding="utf-8")


def describe(model: BaseModel, has_code: bool, folder: Path) -> str:
    """Markdown: what the model is made of, how to call it, under which prompts.

    Args:
        model: a model of backbone, and a pooling and perhaps ``Normalize``, or a head.
        has_code: whether its repository holds code of its own.
        folder: the sealed folder.
    """
    template = importlib.resources.files(__package__).joinpath("model_card_template.md").read_text(encoding="utf-8")
    card, config = model.model_card_data, model.transformers_model.config
    text_config = config.get_text_config()
    attention = attention_of(model)
    last = model.tokenizer.convert_ids_to_tokens(model.preprocess(["a"])["input_ids"][0].tolist())[-1]
    ends = last in model.tokenizer.all_special_tokens
    recipe, pooling = _pooling(model)
    name = card.model_id or model._model_card_model_id_placeholder
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return template.format(
        base=card.base_model or _public_name(config._name_or_path) or "An LLM",
        recipe=recipe or f"with {attention} attention",
        llm=f"`{config.model_type}`, {text_config.num_hidden_layers} layers, {parameters:.3g} M parameters in all",
        attention={"causal": "causal: a token sees those before it", "bidirectional": "bidirectional: no causal mask"}[
            attention
        ],
        pooling=pooling,
        eos=f"the token `{last}`" if ends else "nothing is added",
        longest=model.max_seq_length,
        embedding=_embedding(model),
        model_class=model.model_type,
        kind=KINDS[model.model_type],
        loads_with="`trust_remote_code=True`, which runs the code in this repository"
        if has_code
        else "sentence-transformers alone, no remote code",
        name=name,
        trust=", trust_remote_code=True" if has_code else "",
        prompts=_prompts(model),
        engines=_engines(folder, name) if isinstance(model, SentenceTransformer) else NO_ENGINES,
        transformers=_plain_usage(model, name, has_code),
    ).strip()


def _engines(folder: Path, name: str) -> str:
    """The rows of a table: who gives the model's vectors, and by which line.

    The name is quoted, here as in Python: by that ``finish_card`` finds it when the model gets another.
    """
    quoted = f'"{name}"'
    if (folder / ADAPTER_CONFIG).is_file():
        merge = f"`st-llm-embed merge {quoted} FOLDER` first"
        return f"| vLLM, TEI, ONNX, llama.cpp | no | {merge} |"
    found = engines(folder)
    vllm = f"`vllm serve {quoted} --runner pooling`"
    rows = {
        "vLLM": {"plugin": f"{vllm}, with `pip install --no-deps st-llm-embed` beside vLLM", "right": vllm},
        "TEI": {"right": f"`text-embeddings-router --model-id {quoted}`, on a GPU"},
        "llama.cpp": {"right": f"`llama_cpp.sh {quoted} FILE.gguf`, of st-llm-embed's `examples/serving`"},
    }
    lines = [
        f"| {engine} | {'refuses it' if found[engine] == 'refused' else 'yes'} | {row.get(found[engine], '')} |"
        for engine, row in rows.items()
    ]
    onnx = f"| ONNX Runtime, OpenVINO, TEI on a CPU | yes | `st-llm-embed export-onnx {quoted} FOLDER` |"
    return "\n".join([*lines, onnx])


def _public_name(name: str) -> str:
    """Of a folder of this machine none: what it is called may be nobody's business."""
    return "" if Path(name).is_absolute() or Path(name).exists() else name


def _embedding(model: BaseModel) -> str:
    """What a text gives, in words."""
    dimensions = f"{model.get_embedding_dimension():,} dimensions"
    if isinstance(model, SparseEncoder):
        return f"{dimensions}, the tokens of the vocabulary, nearly all of them 0"
    length = ", length 1" if _normalizes(model) else ""
    return f"{dimensions}{length}" if isinstance(model, SentenceTransformer) else f"{dimensions} a token{length}"


def _pooling(model: BaseModel) -> tuple[str, str]:
    """The recipe that a pooling belongs to, and the pooling in words. By name: published models bring their own
    class."""
    if not isinstance(model, SentenceTransformer):
        recipe, pooling = HEADS[model.model_type]
        return recipe, pooling.format(**model[-1].get_config_dict())
    module = model[1]
    settings = module.get_config_dict()
    match type(module).__name__:
        case "LatentAttentionPooling":
            size = f"{settings['num_latents']} latents, {settings['num_heads']} heads"
            return NV_EMBED, f"latent attention ({size}), then the mean over the text's tokens"
        case "PromptTokenPooling" if settings["num_tokens"] == 1:
            return LLARA, "the last token, after the prompt"
        case "PromptTokenPooling":
            return f"{LLARA} (its released code)", f"the mean over the last {settings['num_tokens']} tokens"
        case _:
            words = {"mean": "the mean over all tokens", "lasttoken": "the last token"}
            return "", words.get(settings.get("pooling_mode"), f"`{module!r}`")


def _normalizes(model: BaseModel) -> bool:
    return any(isinstance(module, Normalize) for module in model)


def _prompts(model: BaseModel) -> str:
    prompts = {name: prompt for name, prompt in model.prompts.items() if prompt}
    if not prompts:
        return "Texts get no prompt."
    rows = "\n".join(
        f"| {_code(repr(name)[1:-1])} | {_code(repr(prompt))} | {_called_by(model, name)} |"
        for name, prompt in prompts.items()
    )
    return (
        "It was trained with prompts; `{text}` is where the text goes, else it follows.\n\n"
        f"| prompt | text | used by |\n| --- | --- | --- |\n{rows}"
    )


def _called_by(model: BaseModel, name: str) -> str:
    if name in ("query", "document"):
        return _code(f"model.encode_{name}(texts)")
    sides = not isinstance(model, SentenceTransformer)  # by which other lengths and tokens may hold
    side = f"_{'document' if name.endswith(OF_DOCUMENTS) else 'query'}" if sides else ""
    return _code(f"model.encode{side}(texts, prompt_name={json.dumps(name, ensure_ascii=False)})")


def _code(text: str) -> str:
    """Code in a cell of a Markdown table, whatever is in it."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")


def _plain_usage(model: BaseModel, name: str, has_code: bool) -> str:
    """The same embeddings by transformers alone, where config.json and the tokenizer say it all."""
    pooled = POOLED.get(model[1].pooling_mode) if isinstance(model[1], Pooling) else None
    if has_code or pooled is None or getattr(model.transformers_model, "peft_config", None):
        return ""
    return PLAIN.format(
        name=name,
        prompt=model.prompts.get("query") or "",
        longest=model.max_seq_length,
        pooled=pooled,
        normalized="embeddings = torch.nn.functional.normalize(embeddings)\n" if _normalizes(model) else "",
    )
