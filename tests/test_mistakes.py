"""A configuration that is wrong is refused before any weights are loaded, with the line, and nothing is written."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import save_llm
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoTokenizer, BertConfig, BertModel

from st_llm_embed.cli import main
from st_llm_embed.training import stages, start, train_stages

# Every part that a configuration can have.
WHOLE: dict[str, Any] = {
    "output": "run",
    "vectors": "vectors",
    "name": "our model",
    "seed": 3,
    "model": {
        "base": "llm",
        "recipe": "nv-embed",
        "attention": "bidirectional",
        "num_latents": 4,
        "num_layers": 2,
        "max_seq_length": 64,
        "query_length": 32,
        "lora": {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "model_kwargs": {"trust_remote_code": False},
    },
    "arguments": {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.1,
        "lr_scheduler_type": "cosine",
        "temperature": 0.05,
    },
    "data": {
        "texts": {
            "read": "consecutive_texts",
            "documents": "documents.csv",
            "split": "paragraphs",
            "columns": {"text": "body"},
        },
        "pairs": {
            "read": "from_columns",
            "source": "pairs.csv",
            "anchor": "question",
            "positive": "answer",
            "instruction": "Find the answer",
            "document_prompt": "passage: ",
            "weight": 2.0,
            "mine": {"teacher": "retrieval", "num_negatives": 2, "relative_margin": 0.05, "range_max": 10},
        },
        "docs": {
            "read": "load_dataset",
            "path": "json",
            "data_files": "docs.jsonl",
            "split": "train",
            "instruction": "Find it",
        },
        "dev": {"read": "from_columns", "source": "docs.jsonl", "negatives": ["negative_1"], "instruction": "Find it"},
        "banking77": {"read": "from_class_examples", "source": "moods.jsonl", "negatives": 1, "seed": 1},
        "single": {"read": "from_texts", "source": "moods.jsonl", "kind": "documents"},
        "known": {
            "read": "from_columns",
            "source": "pairs.csv",
            "anchor": "question",
            "positive": "answer",
            "instruction": "Find the answer",
            "query_prompt": "ask {instruction}: ",
            "teacher_embeddings": {"anchor": "eight.npy", "positive": "eight.npy"},
        },
    },
    "stages": [
        {"name": "pretext", "data": ["texts"], "model": {"lora": True}, "loss": {"form": "mean", "num_tokens": 1}},
        {
            "name": "retrieval",
            "data": ["docs"],
            "eval_data": ["dev"],
            "eval_tasks": ["beir"],
            "eval_split": "dev",
            "early_stopping_patience": 2,
            "loss": {"matryoshka_dims": [32, 8], "matryoshka_weights": [1, 0.5]},
            "arguments": {"stage": 1, "eval_strategy": "steps", "eval_steps": 1, "false_negative_margin": 0.95},
        },
        {"name": "blended", "data": ["pairs", "banking77"], "arguments": {"stage": 2, "spread_weight": 0.1}},
        {
            "name": "taught",
            "data": ["single", "known"],
            "arguments": {"distill_weight": 2.0, "score_weight": 0.1, "contrastive_weight": 0.5},
            "teach": {
                "teacher": "large",
                "trust_remote_code": False,
                "model_kwargs": {"dtype": "bfloat16"},
                "truncate_dim": 8,
                "instructions": False,
                "tokens_per_batch": 4,
                "projection": True,
                "train_projection": True,
                "sample": 10,
            },
        },
    ],
    "seal": {"license": "apache-2.0", "samples": False},
    "evaluate": {"tasks": ["beir"], "split": "test", "batch_size": 8},
}


def write(name: str, *rows: dict[str, str]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the configuration names, beside it."""
    folder = tmp_path_factory.mktemp("mistakes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_files()
    return folder


def make_files() -> None:
    save_llm(Path("llm"))
    save_llm(Path("untied"), tie_word_embeddings=False)
    BertModel(BertConfig(vocab_size=700, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        "bert"
    )
    tokenizer = AutoTokenizer.from_pretrained("llm")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained("bert")
    for name in ("other", "large"):
        SentenceTransformer(modules=[Transformer("bert"), Pooling(8)]).save_pretrained(name)
    Path("documents.csv").write_text('body,day\n"A cat.\n\nA dog.\n\nA fox.",1\n')
    Path("pairs.csv").write_text("question,answer\n" + "".join(f"how {i}?,so {i}\n" for i in range(8)))
    write("docs.jsonl", *({"anchor": f"how {i}?", "positive": f"so {i}", "negative_1": f"no {i}"} for i in range(8)))
    write("moods.jsonl", *({"text": f"{mood} {i}", "label": mood} for mood in ("glad", "sad") for i in range(4)))
    Path("beir/qrels").mkdir(parents=True)
    write("beir/corpus.jsonl", *({"_id": f"d{i}", "title": "", "text": f"so {i}"} for i in range(4)))
    write("beir/queries.jsonl", *({"_id": f"q{i}", "text": f"how {i}?"} for i in range(4)))
    for split in ("dev", "test"):
        Path(f"beir/qrels/{split}.tsv").write_text(
            "query\tdocument\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(4))
        )
    np.save("eight.npy", np.ones((8, 8), np.float32))
    write("notext.jsonl", {"anchor": "a", "positive": 7})
    write("norows.jsonl")
    write("half.jsonl", {"anchor": "how?", "positive": "so"})
    Path("broken.csv").write_text('question,answer\n"how?,so\n')
    Path("header.csv").write_text("question,answer\n")


@pytest.fixture
def files(folder, monkeypatch):
    """Those files; and whoever would load weights fails."""
    monkeypatch.chdir(folder)
    for module in (stages, start):
        for name in ("begin", "build_model", "load_trusted"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, loaded)


def loaded(*_: object, **__: object) -> None:
    raise AssertionError("weights would be loaded now")


def paths(values: Any = WHOLE, place: tuple = ()) -> Iterator[tuple]:
    """Every key at every depth."""
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in entries:
        yield (*place, key)
        yield from paths(value, (*place, key))


def changed(change: Callable[[dict], object]) -> str:
    settings = copy.deepcopy(WHOLE)
    change(settings)
    return yaml.safe_dump(settings, sort_keys=False)


def parent(settings: Any, place: tuple) -> Any:
    for step in place[:-1]:
        settings = settings[step]
    return settings


def refusal(text: str) -> str:
    Path("run.yaml").write_text(text)
    before = sorted(Path().rglob("*"))
    with pytest.raises((ValueError, OSError)) as error:
        train_stages("run.yaml")
    assert sorted(Path().rglob("*")) == before
    return str(error.value)


def line_of(text: str, word: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if word in line)


def test_the_whole_is_right(files):
    Path("run.yaml").write_text(yaml.safe_dump(WHOLE))
    with pytest.raises(AssertionError, match="weights would be loaded now"):
        train_stages("run.yaml")


FREE = ("data",)  # its keys are names of one's own
KEYS = [
    p
    for p in paths()
    if isinstance(p[-1], str)
    and p[:-1] != FREE
    and "model_kwargs" not in p[:-1]
    and not {"columns", "teacher_embeddings"} & set(p[:-1])
]


@pytest.mark.parametrize("place", KEYS, ids=lambda place: ".".join(map(str, place)))
def test_every_key_misspelt(files, place):
    def misspell(settings: dict) -> None:
        part = parent(settings, place)
        part[f"{place[-1]}z"] = part.pop(place[-1])

    text = changed(misspell)
    message = refusal(text)
    name = f"{place[-1]}z"
    if place[-1] == "read":  # without which no other key has a meaning
        assert "lacks read. Valid: consecutive_texts, from_beir" in message
    elif place[:2] == ("data", "docs"):  # load_dataset hands on what it does not know
        assert name in message or "docs" in message
    else:
        assert f"line {line_of(text, f'{name}:')}, " in message and f"{name}: is an unknown key." in message


VALUES = [p for p in paths() if "model_kwargs" not in p[:-1] and p[-1] not in ("matryoshka_weights",)]


@pytest.mark.parametrize("place", VALUES, ids=lambda place: ".".join(map(str, place)))
def test_every_value_of_another_type(files, place):
    def spoil(settings: dict) -> None:
        part = parent(settings, place)
        part[place[-1]] = {"wrong": [1]} if not isinstance(part[place[-1]], dict) else "wrong"

    message = refusal(changed(spoil))
    assert (
        "has the value {'wrong': [1]}. It takes" in message
        or "has the value 'wrong'. It takes" in message
        or (place == ("data", "docs", "data_files") or place[-1] in ("read", "recipe", "lora", "seal"))
    ), message


def at(*place: str | int, value: Any) -> Callable[[dict], object]:
    return lambda settings: parent(settings, place).update({place[-1]: value})


def without(*place: str | int) -> Callable[[dict], object]:
    return lambda settings: parent(settings, place).pop(place[-1])


LAST = ("stages", 2, "arguments")
MISTAKES: list[tuple[Callable[[dict], object], str]] = [
    # Files
    (at("model", "base", value="nowhere/llm/deep"), "base='.*nowhere/llm/deep' could not be loaded"),
    (at("model", "base", value="bert"), "'bert' is an encoder.*takes decoder-only LLMs"),
    (at("model", "base", value="beir"), "beir has no config.json"),
    (
        at("data", "banking77", "source", value="absent.jsonl"),
        "line .*, data.banking77: There is no file or folder absent",
    ),
    (at("data", "pairs", "source", value="sub/dir/x.csv"), "data.pairs: There is no file or folder .*/sub/dir/x.csv"),
    (at("data", "pairs", "source", value="broken.csv"), "data.pairs: Line 2 of broken.csv cannot be read"),
    (at("data", "pairs", "source", value="header.csv"), "data.pairs: The source is empty: header.csv"),
    (at("data", "banking77", "source", value="norows.jsonl"), "data.banking77: The source is empty: norows.jsonl"),
    (at("data", "pairs", "anchor", value="query"), r"data.pairs: .*has the columns \['question', 'answer'\], and not"),
    (
        at("data", "dev", value={"read": "from_columns", "source": "notext.jsonl"}),
        "data.dev: .*No task is known as 'dev'",
    ),
    (at("data", "pairs", "source", value="notext.jsonl"), r"data.pairs: .*has the columns \['anchor', 'positive'\]"),
    (at("data", "banking77", "text", value="number"), "data.banking77: .*has the columns"),
    (at("data", "dev", "negatives", value=["negative_2"]), "data.dev: .*negative_2"),
    (at("data", "texts", "documents", value="header.csv"), "data.texts: .*lack.*body|data.texts: .*not .'body'."),
    (at("data", "texts", "split", value="words"), "data.texts: split='words' is unknown. Valid: paragraphs"),
    (at("data", "texts", "columns", value={"text": "boddy"}), "data.texts: .*has the columns .*and not ..boddy"),
    (at("data", "docs", "data_files", value="absent.jsonl"), "data.docs: .*absent.jsonl"),
    (at("data", "docs", "split", value="trian"), "data.docs: .*trian"),
    (without("data", "docs", "split"), "data.docs: It is read as train. Name one of them: split: train"),
    (
        at("data", "pairs", "mine", "corpus", value="./absent.csv"),
        "data.pairs: There is no file or folder .*/absent.csv",
    ),
    (
        at("data", "pairs", "mine", "teacher", value="./absent"),
        "data.pairs: There is no folder .*absent",
    ),
    (at("evaluate", "tasks", value=["./absent"]), "evaluate: .*/absent is neither a folder nor a task"),
    (at("evaluate", "split", value="validation"), "evaluate: .*validation"),
    (at("stages", 1, "eval_split", value="validation"), "stages.retrieval: .*validation"),
    # Prompts that leave no room for text
    (
        at("model", "query_length", value=8),
        "stages.retrieval: the prompt 'Instruct: Find it.*no room .* query_length=8",
    ),
    (at("model", "max_seq_length", value=4), "takes .* tokens.*which leaves no room for text within max_seq_length=4"),
    (
        at("stages", 2, "model", value={"max_seq_length": 6, "query_length": 6, "document_length": 4}),
        "stages.blended: the prompt .* leaves no room for text within",
    ),
    (
        at("data", "pairs", "document_prompt", value="passage " * 99),
        "the prompt 'passage .*no room .* max_seq_length=64",
    ),
    (at("data", "pairs", "instruction", value="Find {text}"), r"data.pairs: .*'\{text\}' in its instruction"),
    (at("data", "banking77", "document_prompt", value="x"), "document_prompt, and is of the kind 'classification'"),
    (
        at("data", "docs", "query_prompt", value="{task}\nQ: "),
        "query_prompt='{task}.*In braces it may have '{instruction}'",
    ),
    (at("stages", 0, "loss", "self_prompt", value="{text} " + "sentence " * 99), "stages.pretext: .*leaves no room"),
    (at("stages", 0, "loss", "self_prompt", value="The text:"), r"stages.pretext: .*must contain '\{text\}'"),
    (at("stages", 0, "loss", "num_tokens", value=99), "stages.pretext: num_tokens=99 is outside 1"),
    # The model
    (
        at("model", "recipe", value="nv-embd"),
        "line .*model.recipe: has the value .nv-embd.. Valid recipes: nv-embed, llara",
    ),
    (at("model", "num_layers", value=3), "model: num_layers=3 is outside 1..2"),
    (at("model", "num_layers", value=0), "model.num_layers: has the value 0. It takes 1 or more"),
    (at("model", "max_seq_length", value=-3), "model.max_seq_length: has the value -3. It takes 1 or more"),
    (at("model", "attention", value="both"), "model.attention: .*It takes 'bidirectional' or 'causal'"),
    (at("model", "mlp", value="relu"), "model: mlp='relu' is unknown"),
    (at("model", "num_heads", value=5), "model: .*num_heads"),
    (at("model", "backend", value="onnx"), "model.backend: is an unknown key"),
    (at("model", "lora", "target_modules", value=["q_porj"]), "model: Target modules .*q_porj.* not found"),
    (at("model", "lora", "lora_dropout", value=-1), "lora_dropout: has the value -1. It takes 0 or more"),
    (at("model", "lora", "r", value=0), "model.lora.r: has the value 0. It takes 1 or more"),
    (lambda s: s["model"].update(recipe="mean", lora=True, num_latents=1), "num_latents: is an unknown key"),
    (lambda s: s.update(model={"base": "llm", "recipe": "mean", "lora": True}), "recipe='mean' names no LoRA"),
    (
        lambda s: (s.update(model={"load": "llm"}), s["stages"].pop(0)),
        "model: load='llm' is no model of sentence-transformers",
    ),
    (lambda s: (s.update(model={"load": "absent/model/x"}), s["stages"].pop(0)), "model: .*absent/model/x"),
    (lambda s: s.update(model={"load": "llm", "base": "llm"}), "model.base: is an unknown key"),
    (
        lambda s: (s.update(model={"load": "other", "lora": {"target_modules": ["q_porj"]}}), s["stages"].pop(0)),
        "model: Target modules .*q_porj.* not found",
    ),
    (
        lambda s: (s.update(model={"load": "other", "max_seq_length": 3}), s["stages"].pop(0)),
        "stages.retrieval: .*no room for text within max_seq_length=3",
    ),
    (lambda s: s.update(model={"load": "other"}), "stages.pretext: has lora: true, the recipe's, and a loaded model"),
    (at("model", "base", value="untied"), "stages.pretext: .*does not tie its LM head.*lm_head: base"),
    # Stages
    (at("stages", value=[]), "stages: has the value .*1 or more"),
    (
        at("stages", 2, "data", value=["pears"]),
        r"stages.blended: the data sets \['pears'\] are not there. There are: texts",
    ),
    (at("stages", 2, "data", value=[]), "stages.blended.data: has the value .*1 or more"),
    (at("stages", 2, "data", value=["pairs", "pairs"]), "stages.blended: names a data set twice"),
    (at("stages", 2, "data", value=["pairs", "texts"]), "stages.blended: has pretext rows beside others"),
    (at("stages", 2, "name", value="retrieval"), "name='retrieval' is another stage's too"),
    (at("stages", 2, "name", value="../up"), "name='../up' must be that of a folder: without slashes"),
    (at("stages", 2, "name", value=""), "stages.3.name: has the value ''. It takes 1 or more of them"),
    (at("stages", 2, "eval_data", value=["dev"]), "stages.blended: has eval_data or eval_tasks, and no eval_strategy"),
    (at("stages", 1, "eval_data", value=["texts"]), "stages.retrieval: .*of another kind than its data"),
    (at("stages", 2, "early_stopping_patience", value=2), "stages.blended: .*neither eval_data nor eval_tasks"),
    (
        at("stages", 1, "early_stopping_patience", value=0),
        "early_stopping_patience: has the value 0. It takes 1 or more",
    ),
    (
        at(*LAST, "eval_steps", value=5),
        "eval_steps=5.0 has no effect: the stage has neither|eval_steps=5 has no effect",
    ),
    (at(*LAST, "greater_is_better", value=True), "greater_is_better=True has no effect"),
    (
        at("stages", 1, "arguments", "metric_for_best_model", value="loss"),
        "stages.retrieval: .*is not measured. There are",
    ),
    # Losses
    (at("stages", 2, "loss", value={"form": "mean"}), "stages.blended: has in its loss form, of PretextLoss"),
    (
        at("stages", 0, "loss", value={"matryoshka_dims": [8]}),
        "stages.pretext: has in its loss matryoshka_dims, of Matr",
    ),
    (at("stages", 0, "loss", "form", value="cloud"), "It takes 'mean', 'paper' or 'release'"),
    (
        at("stages", 0, "loss", value={"objective": "mntp", "form": "mean"}),
        "stages.pretext: has in its loss form, of PretextLoss, and its objective is mntp. Say objective: ebae-ebar",
    ),
    (
        at("stages", 0, "loss", value={"mask_share": 0.2}),
        "stages.pretext: has in its loss mask_share, of MNTPLoss, and its objective is ebae-ebar. Say objective: mntp",
    ),
    (at("stages", 0, "loss", value={"objective": "mlm"}), "loss.objective: .*'mlm'. It takes 'ebae-ebar' or 'mntp'"),
    (at("stages", 0, "loss", value={"objective": "mntp", "mask_share": 0}), "mask_share: .* It takes more than 0"),
    (
        at("stages", 0, "loss", value={"objective": "mntp", "mask_token": "<none>"}),
        "stages.pretext: mask_token='<none>' is no token of the LLM's vocabulary",
    ),
    (
        lambda s: (s["model"].update(attention="causal"), s["stages"][0].update(loss={"objective": "mntp"})),
        "stages.pretext: has objective: mntp, .*has attention: causal. Valid: bidirectional. Say model",
    ),
    (
        at("stages", 2, "loss", value={"objective": "mntp"}),
        "stages.blended: has in its loss objective, of a pretext stage, and has no data of consecutive_texts",
    ),
    (at("data", "texts", "keep_last", value="yes"), "data.texts.keep_last: .*It takes true or false"),
    (
        at("stages", 0, "loss", "lm_head", value="own"),
        "stages.pretext.loss.lm_head: has the value 'own'. It takes 'base'",
    ),
    (at("stages", 1, "loss", "matryoshka_dims", value=[64]), "stages.retrieval: .*64.* 32 dim|must have one for each"),
    (at("stages", 1, "loss", "matryoshka_dims", value=[0]), "matryoshka_dims.1: has the value 0. It takes 1 or more"),
    (at("stages", 1, "loss", "matryoshka_weights", value=[1]), "must have one for each of"),
    (without("stages", 1, "loss", "matryoshka_dims"), "has a loss without matryoshka_dims"),
    # Arguments, the last stage's alone among them
    (at(*LAST, "learning_rate", value=-1), "learning_rate: has the value -1. It takes 0 or more"),
    (at(*LAST, "temperature", value=0), "temperature: has the value 0. It takes more than 0"),
    (at(*LAST, "temperature", value="warm"), "temperature: has the value 'warm'. It takes a number"),
    (at(*LAST, "lr_scheduler_type", value="cosin"), "lr_scheduler_type: .*It takes 'linear', 'cosine'"),
    (at(*LAST, "lr_scheduler_kwargs", value={"number": 1}), "stages.blended: .*unexpected keyword argument 'number'"),
    (at(*LAST, "per_device_train_batch_size", value=0), "per_device_train_batch_size: has the value 0. It takes 1"),
    (at(*LAST, "gradient_accumulation_steps", value=0), "gradient_accumulation_steps: has the value 0. It takes 1"),
    (at(*LAST, "max_steps", value=0), "stages.blended: max_steps=0, num_train_epochs=3 train nothing"),
    (at(*LAST, "max_steps", value=-5), "max_steps: has the value -5. It takes -1 or more"),
    (at("arguments", "warmup_ratio", value=3), "line .*, arguments.warmup_ratio: has the value 3. It takes 1 or less"),
    (at(*LAST, "stage", value=3), "stages.blended: stage=3 is unknown. Valid stages"),
    (at(*LAST, "report_to", value="wandb"), "stages.blended: WandbCallback requires wandb"),
    (at(*LAST, "optim", value="adamw_8bit"), "stages.blended: You need to install `bitsandbytes`"),
    (at(*LAST, "adam_beta1", value=2.0), "stages.blended: Invalid beta"),
    (at(*LAST, "prompts", value={"anchor": "x"}), "stages.blended: tasks= sets the prompts"),
    (at(*LAST, "output_dir", value="x"), "stages.blended.arguments.output_dir: is an unknown key"),
    (
        at(*LAST, "resume_from_checkpoint", value="x"),
        "stages.blended.arguments.resume_from_checkpoint: is an unknown key",
    ),
    (at(*LAST, "gather_across_devices", value=True), "stages.blended: .*gather_across_devices=True has no effect"),
    (at("stages", 0, "arguments", value={"stage": 1, "temperature": 0.5}), "stages.pretext: .*has no effect"),
    (at("stages", 0, "arguments", value={"max_steps": -1}), "stages.pretext: its data stream, .* Say max_steps"),
    (at("arguments", "label_smoothing_factor", value=0.1), "label_smoothing_factor=0.1 has no effect"),
    (
        at("arguments", "push_to_hub", value="yes"),
        "arguments.push_to_hub: has the value 'yes'. It takes true or false",
    ),
    # Data and tasks
    (
        at("data", "banking77", "negatives", value=0),
        "stages.blended: Task 'banking77' is trained without in-batch neg",
    ),
    (
        at("data", "pairs", "kind", value="retreival"),
        "data.pairs.kind: has the value 'retreival'. It takes 'retrieval', 'sts'",
    ),
    (at("data", "pairs", "weight", value=0), "data.pairs.weight: has the value 0. It takes more than 0"),
    (without("data", "pairs", "instruction"), "data.pairs: No task is known as 'pairs'"),
    (at("data", "dev", "mine", value={"teacher": "org/model"}), "data.dev: mine would replace negative_1"),
    (at("data", "pairs", "streaming", value=True), "data.pairs.streaming: is an unknown key"),
    (
        at("data", "pairs", "mine", "teacher", value="blended"),
        "data.pairs.mine: the teacher 'blended' is a stage that com",
    ),
    (at("data", "pairs", "mine", "teacher", value="beir"), "data.pairs: The teacher .*beir.* is no model"),
    (at("data", "pairs", "mine", "teacher", value="llm"), "data.pairs: The teacher is a causal LLM"),
    (at("data", "pairs", "mine", "use_faiss", value="exact"), "data.pairs: use_faiss='exact' needs FAISS"),
    (at("data", "pairs", "mine", "use_faiss", value=True), "data.pairs.mine.use_faiss: "),
    (
        at("data", "pairs", "mine", "corpus_columns", value={"text": "x"}),
        "data.pairs: mine has corpus_columns, and no",
    ),
    (at("data", "pairs", "source", value=""), "data.pairs.source: has the value ''. It takes 1 or more"),
    (at("data", "texts", "max_characters", value=0), "data.texts.max_characters: has the value 0. It takes 1 or more"),
    (lambda s: s["data"].update({"../up": s["data"].pop("pairs")}), "data sets .'pairs'. are not there"),
    (at("stages", 2, "name", value="x" * 300), "must be that of a folder: without slashes, at most 200 bytes"),
    (at("stages", 2, "eval_split", value="dev"), "stages.blended: has eval_split, and no eval_tasks"),
    (at("stages", 1, "loss", "n_dims_per_step", value=5), "n_dims_per_step=5, and 2 matryoshka_dims"),
    (at("seed", value=1 << 40), "seed: has the value 1099511627776. It takes less than"),
    (at(*LAST, "num_train_epochs", value=2), "stages.blended: num_train_epochs=2 has no effect beside max_steps=2"),
    (at(*LAST, "save_only_model", value=True), "stages.blended.arguments.save_only_model: is an unknown key"),
    (at(*LAST, "do_train", value=False), "stages.blended.arguments.do_train: is an unknown key"),
    (at(*LAST, "log_level", value="loud"), "log_level: has the value 'loud'. It takes 'detail', 'debug'"),
    (at(*LAST, "use_liger_kernel", value=True), "use_liger_kernel needs liger-kernel. Fix: pip install"),
    (
        at("stages", 2, "model", value={"lora": {"target_modules": ["x"]}}),
        "line 1.., stages.blended.model: Target modules",
    ),
    (
        at("data", "pairs", "mine", "num_negatives", value=20),
        "data.pairs: range_min=0 and range_max=10 must leave room",
    ),
    (
        at("data", "banking77", "read", value="from_class_exmples"),
        "data.banking77.read: has the value 'from_class_exmples'. Valid: ",
    ),
    (at("data", "banking77", value={"read": "from_class_examples"}), "data.banking77: lacks source"),
    (at("evaluate", "tasks", value=["SciFct"]), "evaluate: SciFct is neither a folder nor a task.*SciFact"),
    (at("evaluate", "batch_size", value=0), "evaluate.batch_size: has the value 0. It takes 1 or more"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[f"{i}-{m[:40]}" for i, (_, m) in enumerate(MISTAKES)])
def test_mistakes(files, change, message):
    text = changed(change)
    assert re.search(message, refusal(text), re.DOTALL)


def test_how_many():
    assert len(KEYS) + len(VALUES) + len(MISTAKES) >= 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: [a\nmodel: {", "run.yaml is not a YAML file.*line 2"),
        ("output: a\nmodel: {base: x}\noutput: b", "'output' is there twice .* line 3"),
        ("", "the configuration: has the value None. It takes a mapping"),
        ("- output", r"the configuration: has the value \['output'\]. It takes a mapping"),
        ("output: run", "the configuration: lacks model, data, stages"),
    ],
)
def test_no_configuration(files, text, message, capsys):
    Path("run.yaml").write_text(text)
    assert main(["train", "run.yaml"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_the_command_line_sets_wrongly(files, capsys):
    Path("run.yaml").write_text(yaml.safe_dump(WHOLE))
    assert main(["train", "run.yaml", "--set", "stages.blended.arguments.stage=two"]) == 2
    assert "run.yaml, --set stages.blended.arguments.stage: has the value 'two'. It takes a whole number." in (
        capsys.readouterr().err
    )
    assert main(["train", "absent.yaml"]) == 2
    assert "absent.yaml" in capsys.readouterr().err
