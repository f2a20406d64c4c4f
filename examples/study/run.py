"""The study's rows: train each as ``study.yaml`` says, evaluate it on all test sets, keep the figures.

    python -m examples.study.run --data ../shared/data --output study-cpu --size cpu --seeds 0

Each row is a configuration of ``st-llm-embed train``. A row whose figures or model are there is not run again, and
rows that begin with the same stages train those once (``shared_stages``). Several processes may share the work.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import mteb
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router
from torch import Tensor
from transformers import set_seed

from examples.demo.llm import bundled_llm
from examples.study.prepare import TEACHER, TEXT, TEXTS
from examples.study.study import STUDY, parser_of
from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, PretextLoss, build_model
from st_llm_embed.data import consecutive_texts, from_texts
from st_llm_embed.data.sources import load_rows
from st_llm_embed.evaluation import evaluate, local_task
from st_llm_embed.evaluation.encoder import PromptedEncoder
from st_llm_embed.evaluation.evaluate import evaluate_encoder
from st_llm_embed.files import read_json, written_beside
from st_llm_embed.teaching import align
from st_llm_embed.training import train_stages
from st_llm_embed.trust import load_trusted, model_class
from st_llm_embed.weights.averaging import average_checkpoints

NOT_MODEL = {"stages", "negatives", "classes", "against", "after", "size", "prompts", "aligned"}
CLOZE = f"{TEXT}_cloze"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AUTOREGRESSIVE = "autoregressive"  # a stage that st-llm-embed train does not know


class AutoregressiveLoss(PretextLoss):
    """Next-token prediction on the text, through the same pass: what more ordinary training would do."""

    def forward(self, sentence_features: list[dict[str, Tensor]], labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"ar": super().forward(sentence_features, labels)["ar"]}


def configuration(row: str, size: dict[str, Any], folders: tuple[Path, Path], seed: int) -> dict[str, Any]:
    """The settings of ``train_stages`` for one row, but for its output."""
    source, prepared = folders
    of = {**STUDY["base"], **STUDY["rows"][row]}
    train = STUDY["sets"][size["sets"]]["train"]

    def rows_of(name: str) -> dict[str, Any]:
        file = prepared / f"{name}.jsonl.gz"
        return {"read": "load_dataset", "path": "json", "data_files": str(file), "split": "train"}

    data = {name: rows_of(f"{name}-{of['negatives']}") for name in [*train["retrieval"], *train["sts"]]}
    for name in train["nli"]:
        data[name] = {"read": "from_nli", "source": str(source / name / "train.jsonl.gz"), "label": "label_text"}
    for name in train["classes"]:
        data[name] = {
            "read": f"from_class_{of['classes']}",
            "source": str(prepared / f"{name}.jsonl.gz"),
            "label": "label_text",
            "negatives": size.get("negatives", 1),
        }
    groups = {
        "retrieval": train["retrieval"],
        "all": list(data),
        "pretext": [TEXT],
        "pairs": [*train["retrieval"], CLOZE],
        "texts": [TEXTS],
        "texts and pairs": [TEXTS, *train["retrieval"], CLOZE],
    }
    data[TEXTS] = {"read": "from_texts", "source": str(prepared / f"{TEXTS}.jsonl.gz")}
    data[TEXT] = {
        "read": "consecutive_texts",
        "documents": str(source / TEXT / "train.jsonl.gz"),
        "document_column": "doc",
        "max_characters": 300,
    }
    data[CLOZE] = {
        **rows_of(f"{TEXT}-none"),
        "instruction": "Given a sentence, find the paragraph that it was taken from",
    }
    if not of["prompts"]:
        for name in train["retrieval"] + [CLOZE]:
            data[name]["query_prompt"] = ""
    stages, sample = [], size.get("sample", 20_000)
    for name in of["stages"]:
        stage = STUDY["stages"][name]
        pretext = stage["data"] == "pretext"
        usual = round(size["pretext_steps" if pretext else "steps"] * stage.get("steps", 1))
        steps_of = {name: usual, **size.get("steps_of", {})}
        steps = steps_of.get(row, steps_of[name])
        arguments = {**stage.get("arguments", {}), "max_steps": steps}
        if not pretext:
            arguments["sampling_temperature"] = 2.0  # of tasks
        # Vectors by a projection into the teacher's space; scores need none.
        fit = {"projection": False} if stage.get("teach") == "scores" else {"refit": True, "sample": sample}
        taught = {"teach": {"teacher": str(TEACHER), **fit}} if stage.get("teach") else {}
        loss = {"loss": stage["loss"]} if "loss" in stage else {}
        stages.append({"name": name, "data": groups[stage["data"]], "arguments": arguments, **loss, **taught})
    model = {key: value for key, value in of.items() if key not in NOT_MODEL}
    learning_rates = {"embed_tokens": 0.0}  # a few thousand texts cannot teach the LLM words
    if model["recipe"] in ("nv-embed", "multi-vector"):
        learning_rates[r"model\.1\."] = 3 * size["learning_rate"]  # it starts from random weights
    if model["recipe"] != "nv-embed":
        model.pop("num_latents")
    return {
        "seed": seed,
        "vectors": str(prepared.parent / "vectors"),
        "model": {
            "base": str(bundled_llm()),
            **model,
            "num_layers": size["layers"],
            "max_seq_length": size["max_seq_length"],
        },
        "data": data,
        "stages": stages,
        "arguments": {
            "per_device_train_batch_size": size["batch_size"],
            "learning_rate": size["learning_rate"],
            "learning_rate_mapping": learning_rates,
            "warmup_steps": 0.1,
            "weight_decay": 0.03,
            "bf16": True,
            "use_cpu": DEVICE == "cpu",
            "dataloader_pin_memory": DEVICE == "cuda",
            "save_steps": 200,
            "save_total_limit": 1,
            "logging_steps": 10,
        },
    }


def train(config: dict[str, Any], folder: Path, output: Path, aligned: bool = False) -> None:
    """Write a row's trained model. Rows that begin with the same stages train those once."""
    run = output / "scratch" / folder.name
    if [stage["name"] for stage in config["stages"]] in ([], [AUTOREGRESSIVE]):
        with written_beside(folder) as staged:
            begin = adapt_autoregressively if config["stages"] else align_untrained if aligned else build
            begin(config, run).save_pretrained(str(staged))
    else:
        trained = train_stages({**config, "output": str(run), "shared_stages": str(output / "stages")})
        with written_beside(folder) as staged:
            trained.rename(staged)
    shutil.rmtree(run, ignore_errors=True)


def build(config: dict[str, Any], scratch: Path) -> SentenceTransformer:
    """The model that a row's training begins with."""
    set_seed(config["seed"])
    return build_model(**config["model"])


def align_untrained(config: dict[str, Any], scratch: Path) -> SentenceTransformer:
    """That, with a projection into the teacher's space in closed form."""
    texts = from_texts(config["data"][TEXTS]["source"])
    teacher = SentenceTransformer(str(TEACHER))
    return align(build(config, scratch), teacher, documents=texts, cache_folder=config["vectors"])[0]


def adapt_autoregressively(config: dict[str, Any], scratch: Path) -> SentenceTransformer:
    """The model after next-token prediction in place of EBAE and EBAR; the same rows in the same order."""
    model = build(config, scratch)
    set_seed(config["seed"] + 1)
    how = config["data"][config["stages"][0]["data"][0]]
    rows = consecutive_texts(
        load_rows(how["documents"], streaming=True),
        document_column=how["document_column"],
        max_characters=how["max_characters"],
    )
    settings = {**config["arguments"], **config["stages"][0]["arguments"], "seed": config["seed"], "report_to": []}
    args = LLMEmbedTrainingArguments(str(scratch), **settings)
    LLMEmbedTrainer(model, args, rows, loss=AutoregressiveLoss(model, form="release")).train()
    return model


def model_folder(name: str, seed: int, arguments: argparse.Namespace) -> Path:
    """The model of a row: if it is not there, trained, or averaged from other rows'."""
    row, size, output = STUDY["rows"][name], STUDY["sizes"][arguments.size], arguments.output
    folder = output / "models" / f"{file_name(name)}-{seed}"
    if not folder.is_dir() and "average" in row:
        base = bundled_llm() if row.get("with_base") else None
        average_checkpoints([model_folder(of, seed, arguments) for of in row["average"]], folder, base=base)
    elif not folder.is_dir():
        config = configuration(name, size, (arguments.data, output / "data" / "train"), seed)
        if "after" in row:
            config["model"] = {"load": str(model_folder(row["after"], seed, arguments))}
        train(config, folder, output, row.get("aligned", False))
    return folder


def asked_of_teacher(folder: Path, longest: int | None, tests: list[Path], output: Path) -> dict[str, float]:
    """nDCG@10 of a student's queries on the teacher's index: a stock model of both, each for its side."""
    student, teacher = load_trusted(folder), load_trusted(TEACHER)
    student.max_seq_length = longest or student.max_seq_length
    both = SentenceTransformer(modules=[Router.for_query_document(list(student), list(teacher))])
    settings = {"max_seq_length": longest, "dtype": "float32", "attn_implementation": "sdpa"}
    encoder = PromptedEncoder(both, folder.name, "on-the-teachers-index", settings)
    tasks = [local_task(test) for test in tests if (test / "qrels").is_dir()]
    with torch.autocast(DEVICE, torch.bfloat16):
        found = evaluate_encoder(encoder, folder.name, tasks, output, 64).results
    return {result.task_name: round(result.get_score(), 5) for result in found}


def file_name(row: str) -> str:
    return row.replace(", ", "-").replace(" ", "-")


def is_taught(name: str) -> bool:
    """Whether a row's model is in the teacher's space."""
    row = STUDY["rows"].get(name, {})
    return row.get("aligned", False) or any(
        STUDY["stages"][stage].get("teach") is True for stage in row.get("stages", [])
    )


def run_row(name: str, seed: int, arguments: argparse.Namespace) -> None:
    """Write one row's figures, unless they are there."""
    file = arguments.output / "rows" / f"{file_name(name)}-{seed}.json"
    if file.is_file():
        return
    start, before, trained = time.perf_counter(), time.process_time(), 0.0
    of_index: dict[str, int] = {}
    size = STUDY["sizes"][arguments.size]
    sets = STUDY["sets"][size["sets"]]
    tests = [arguments.output / "data" / "test" / test for test in sets["test"]]
    if name == "BM25":
        tasks = [local_task(test) for test in tests if (test / "qrels").is_dir()]
        found = mteb.evaluate(mteb.get_model("mteb/baseline-bm25s"), tasks, cache=None).task_results
    else:
        folder, longest = TEACHER, None
        if name != "all-MiniLM-L6-v2":
            folder, longest = model_folder(name, seed, arguments), size.get("test_max_seq_length")
            if model_class(folder) is MultiVectorEncoder:
                tests = [test for test in tests if (test / "qrels").is_dir()]
        trained = time.process_time() - before
        # An LLM that is all bf16 costs students of a teacher a part of their unseen retrieval: the projection
        # magnifies what is rounded off.
        dtype = "float32" if "texts" in size else "bfloat16"
        how = {"batch_size": 64, "dtype": dtype, "max_seq_length": longest}
        with torch.autocast(DEVICE, torch.bfloat16, enabled="texts" in size):
            evaluated = evaluate(folder, tests, arguments.output / "results", **how)
        found = evaluated.results
        if index := [read_json(counted) for counted in (evaluated.folder / "index").glob("*.json")]:
            of_index["bytes_a_document"] = round(sum(c["bytes"] for c in index) / sum(c["documents"] for c in index))
    figures = {result.task_name: round(result.get_score(), 5) for result in found}
    taught = {"processor_seconds": round(trained), **of_index}
    if is_taught(name):
        taught["on_the_teachers_index"] = asked_of_teacher(folder, longest, tests, arguments.output / "results")
    with written_beside(file) as staged:
        seconds = round(time.perf_counter() - start)
        row = {"row": name, "seed": seed, "size": arguments.size, "seconds": seconds, **taught, "scores": figures}
        staged.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    print(f"{name}, seed {seed}: {seconds} s", flush=True)


def rows_of(size: str) -> list[str]:
    """The rows of a size, with the peers."""
    return [*STUDY["peers"], *(name for name, row in STUDY["rows"].items() if row.get("size", size) == size)]


def main() -> None:
    """Run what is missing."""
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trained rows (default: 0)")
    names = [*STUDY["peers"], *STUDY["rows"]]
    parser.add_argument("--rows", nargs="+", choices=names, metavar="ROW", help="of study.yaml (default: all)")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for name in arguments.rows or rows_of(arguments.size):
            untrained = name in STUDY["peers"] or STUDY["rows"][name].get("stages") == []
            if seed == 0 or not untrained:
                run_row(name, seed, arguments)


if __name__ == "__main__":
    main()
