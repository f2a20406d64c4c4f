"""Published models in the hands of strangers, who have plain sentence-transformers: three generations of them.

Each generation is one process without this package for many models at once, for starting it is what takes long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import DENSE, TEXTS
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from st_llm_embed import build_model
from st_llm_embed.hub import seal
from st_llm_embed.recipes import RECIPES
from st_llm_embed.weights.merging import merge_adapter

STOCK_RECIPES = {name for name, recipe in RECIPES.items() if recipe.pooling is Pooling}
FORMS = ("full", "adapter", "merged")
SAMPLE = [
    ("nv-embed", "full"),
    ("llara", "merged"),
    ("llara-release", "full"),
    ("mean", "full"),
    ("last-token", "adapter"),
]
# Its added tokens need a larger base than the one that its adapter is loaded on.
REST = [(recipe, form) for recipe in DENSE for form in FORMS if (recipe, form) not in SAMPLE]
STORED = Path(__file__).with_name("stored")
STRANGER = """
import sys
sys.modules["st_llm_embed"] = None
import json, os, traceback, numpy
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
request = json.loads(sys.stdin.read())
def encode(model, file):
    vectors = {name: model.encode(request["texts"], prompt=prompt) for name, prompt in model.prompts.items()}
    numpy.savez(file + ".npz", **vectors)
def follow(source, trust, copy, tuned):
    model = SentenceTransformer(source, trust_remote_code=trust, device="cpu")
    encode(model, source)
    if copy:
        model.save_pretrained(copy)
    if tuned:
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # a loaded adapter is frozen
                parameter.requires_grad_(True)
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        args = SentenceTransformerTrainingArguments(tuned + "-run", max_steps=2, learning_rate=1e-3, **quiet)
        data = Dataset.from_dict({"anchor": ["a cat", "a dog"] * 4, "positive": ["meow", "woof"] * 4})
        SentenceTransformerTrainer(model, args, data, loss=MultipleNegativesRankingLoss(model)).train()
        model.save_pretrained(tuned)
        encode(model, tuned + "-before")
for job in request["jobs"]:
    try:
        follow(*job)
    except Exception:
        with open(job[0] + ".error", "w") as file:
            file.write(traceback.format_exc())
"""


class Job(NamedTuple):
    """What a stranger does with a folder: load and encode; save a copy; fine-tune, encode and save that."""

    source: Path
    trust: bool
    copy: Path | None = None
    tuned: Path | None = None


def generation(jobs: list[Job], modules: Path) -> dict[Path, dict[str, np.ndarray] | str]:
    """Vectors by prompt, or what went wrong, by source."""
    request = {
        "texts": TEXTS,
        "jobs": [[str(part) if isinstance(part, Path) else part for part in job] for job in jobs],
    }
    subprocess.run(
        [sys.executable, "-I", "-c", STRANGER],
        input=json.dumps(request),
        text=True,
        check=True,
        # Threads cost more than they bring on matrices this small.
        env={**os.environ, "HF_MODULES_CACHE": str(modules), "OMP_NUM_THREADS": "1"},
    )
    return {job.source: vectors(job.source) for job in jobs}


def vectors(file: Path) -> dict[str, np.ndarray] | str:
    error = file.with_name(f"{file.name}.error")
    if error.exists():
        return error.read_text()
    encoded = file.with_name(f"{file.name}.npz")
    if not encoded.exists():
        return f"{file.name} was never made"
    with np.load(encoded) as loaded:
        return dict(loaded)


def difference(one: dict[str, np.ndarray] | str, other: dict[str, np.ndarray] | str) -> float | str:
    failed = next((found for found in (one, other) if isinstance(found, str)), None)
    if failed is not None:
        return failed
    assert set(one) == set(other)
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def make(llm: str, recipe: str, form: str) -> SentenceTransformer:
    model = build_model(llm, recipe)
    if not recipe.startswith("llara"):
        model.prompts["docs"] = "Instruct: find it\nQuery: "
    if form != "full":
        model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return merge_adapter(model) if form == "merged" else model


@pytest.mark.parametrize(
    "cells",
    [
        pytest.param(SAMPLE, id="sample"),
        pytest.param(REST, id="rest"),
    ],
)
@pytest.mark.slow
def test_three_generations_without_this_package(llm, tmp_path, cells):
    expected, trust = {}, {}
    for recipe, form in cells:
        model = make(llm, recipe, form)
        folder = tmp_path / f"{recipe}-{form}".replace("-", "_")
        model.save_pretrained(str(folder))
        seal(folder)
        # An adapter always brings code: the host's module takes main's adapter for any revision, and drops tensors.
        trust[folder] = recipe not in STOCK_RECIPES or form == "adapter"
        assert bool(list(folder.glob("*.py"))) == trust[folder]
        assert (folder / "model.safetensors").exists() == (form != "adapter")
        expected[folder] = {name: model.encode(TEXTS, prompt=prompt) for name, prompt in model.prompts.items()}

    def later(folder: Path, what: str) -> Path:
        return folder.with_name(f"{folder.name}_{what}")

    jobs = [Job(f, trust[f], later(f, "copy"), later(f, "tuned")) for f in expected]
    first = generation(jobs, tmp_path / "modules1")
    jobs = [Job(later(f, "copy"), trust[f]) for f in expected]
    jobs += [Job(later(f, "tuned"), trust[f], None, later(f, "third")) for f in expected]
    second = generation(jobs, tmp_path / "modules2")
    third = generation([Job(later(f, "third"), trust[f]) for f in expected], tmp_path / "modules3")

    problems = {}
    for folder, vectors_ in expected.items():
        copy, tuned, last = later(folder, "copy"), later(folder, "tuned"), later(folder, "third")
        steps = {
            "loaded": (first[folder], vectors_),
            "saved again": (second[copy], vectors_),
            "fine-tuned": (second[tuned], vectors(later(folder, "tuned-before"))),
            "fine-tuned twice": (third[last], vectors(later(folder, "third-before"))),
        }
        for step, pair in steps.items():
            found = difference(*pair)
            if isinstance(found, str) or found > 1e-5:
                problems[folder.name, step] = found
        moved = difference(second[tuned], vectors_), difference(third[last], second[tuned])
        assert all(isinstance(distance, str) or distance > 1e-4 for distance in moved)
        if trust[folder] and copy.is_dir():  # those with code keep what sentence-transformers drops
            config = json.loads((copy / "config_sentence_transformers.json").read_text())
            assert set(config["requirements"]) == {"sentence-transformers", "transformers"}
    assert problems == {}


@pytest.mark.slow
def test_folders_of_older_versions(tmp_path):
    """With the code that they hold, and with what it has become since."""
    folders = [folder for folder in STORED.iterdir() if folder.is_dir()]
    assert {folder.name for folder in folders} >= {"nv-embed-0.1.0", "llara-0.1.0"}
    stored, jobs = {}, []
    for number, folder in enumerate(folders):
        kept = {
            name: np.array(rows, dtype=np.float32)
            for name, rows in json.loads(STORED.joinpath(f"{folder.name}.json").read_text()).items()
        }
        old, new = tmp_path / f"old{number}", tmp_path / f"new{number}"
        subprocess.run(["cp", "-r", folder, old], check=True)
        subprocess.run(["cp", "-r", folder, new], check=True)
        for code in new.glob("*.py"):
            code.unlink()
        modules = (new / "modules.json").read_text()
        for name in ("llm_backbone", "latent_attention_pooling", "prompt_token_pooling"):
            modules = modules.replace(f'"{name}.', f'"st_llm_embed.modules.{name}.')
        (new / "modules.json").write_text(modules)
        model = SentenceTransformer(str(new), trust_remote_code=True, device="cpu")
        here = {name: model.encode(TEXTS, prompt=prompt) for name, prompt in model.prompts.items()}
        assert difference(here, kept) <= 1e-5
        model.save_pretrained(str(tmp_path / f"sealed{number}"))
        seal(tmp_path / f"sealed{number}")
        for source in (old, tmp_path / f"sealed{number}"):
            stored[source] = kept
            jobs.append(Job(source, True, source.with_name(f"{source.name}_copy")))
    found = generation(jobs, tmp_path / "modules1")
    again = generation([Job(job.copy, True) for job in jobs], tmp_path / "modules2")
    for job in jobs:
        for vectors_ in (found[job.source], again[job.copy]):
            assert difference(vectors_, stored[job.source]) <= 1e-5
