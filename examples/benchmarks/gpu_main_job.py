"""The main job on a GPU against the CPU, on tiny random LLMs: vectors, precisions, training, sealing, adapters.

    python -m examples.benchmarks.gpu_main_job

Needs no network; about a minute on a GPU. Prints one line for each part, with its figure. ``gpu.sh`` runs it first.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from conftest import TEXTS, save_llm

from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, Task, build_model
from st_llm_embed.data import consecutive_texts, sentences
from st_llm_embed.hub import check, fresh_python, save_sealed
from st_llm_embed.losses import PretextLoss
from st_llm_embed.mining.negatives import mine_negatives
from st_llm_embed.modules.reference import encode
from st_llm_embed.recipes import RECIPES
from st_llm_embed.weights.merging import merge_adapter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OVERRIDES = {"nv-embed": {"num_latents": 16, "num_heads": 2, "head_dim": 32}}
PAIRS = Dataset.from_dict(
    {name: [f"{name} {i} cat" for i in range(64)] for name in ("anchor", "positive", "negative")}
)
DOCUMENTS = Dataset.from_dict({"text": [f"A cat {i} sat. A dog {i} barked. The moon {i} rose." for i in range(32)]})


class Steps:
    """What a user does, on one tiny LLM."""

    def __init__(self, root: Path) -> None:
        self.root, self.llm = root, save_llm(root / "llm", hidden_size=64)

    def build(self, recipe: str, **more: object) -> object:
        torch.manual_seed(0)
        return build_model(self.llm, recipe, **OVERRIDES.get(recipe, {}), **more)

    def vectors(self, recipe: str) -> str:
        model = self.build(recipe)
        prompts = model.prompts or {"": ""}
        on_gpu = {name: encode(model, TEXTS, name, prompt).cpu() for name, prompt in prompts.items()}
        model.to("cpu")
        apart = max(
            float((encode(model, TEXTS, name, prompts[name]) - vectors).abs().max())
            for name, vectors in on_gpu.items()
        )
        return f"GPU and CPU differ by {apart:.1e} in float32"

    def half(self, recipe: str, dtype: torch.dtype) -> str:
        model = self.build(recipe)
        whole = model.encode(list(TEXTS), convert_to_tensor=True)
        rounded = model.to(dtype).encode(list(TEXTS), convert_to_tensor=True)
        return f"lowest cosine to float32 {torch.cosine_similarity(whole, rounded.float()).min():.4f}"

    def sealed(self, recipe: str, adapter: bool = False) -> str:
        model = self.build(recipe)
        if adapter:
            model.add_adapter(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        folder = save_sealed(model, self.root / f"{recipe}-{adapter}")
        return f"check differs by {check(folder, device=DEVICE).difference:.1e}"

    def train(self, recipe: str, lora: bool = False, pretext: bool = False, **arguments: object) -> str:
        model = self.build(recipe, lora=lora)
        quiet = {"report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
        quiet |= {"use_cpu": DEVICE == "cpu"}
        args = LLMEmbedTrainingArguments(
            str(self.root / "run"),
            **{"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-3, **quiet, **arguments},
        )
        if pretext:
            trainer = LLMEmbedTrainer(model, args, consecutive_texts(DOCUMENTS, sentences), loss=PretextLoss(model))
        else:
            trainer = LLMEmbedTrainer(model, args, {"t": PAIRS}, tasks=[Task("t", "Find it", negatives=1)])
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return f"loss {losses[0]:.2f} to {losses[-1]:.2f}"

    def merge(self) -> str:
        model = self.build("last-token")
        model.add_adapter(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        return f"merged on {merge_adapter(model).device}"

    def mine(self) -> str:
        mined = mine_negatives(
            PAIRS.select_columns(["anchor", "positive"]), self.build("mean"), num_negatives=2, relative_margin=None
        )
        return f"{len(mined.rows)} rows"


def run(recipes: Iterable[str] = RECIPES, compiles: bool = True) -> dict[str, str]:
    """What each part says, by its name; printed as it comes.

    Args:
        recipes: those whose vectors and sealed folders are compared.
        compiles: whether torch.compile is tried, which takes most of the time on a CPU.
    """
    found: dict[str, str] = {}

    def part(name: str, act: Callable[[], str]) -> None:
        found[name] = act()
        print(f"{name:44} {found[name]}", flush=True)

    with tempfile.TemporaryDirectory() as folder, fresh_python():
        steps = Steps(Path(folder))
        for recipe in recipes:
            part(f"vectors, {recipe}", lambda recipe=recipe: steps.vectors(recipe))
            part(f"sealed, {recipe}", lambda recipe=recipe: steps.sealed(recipe))
        part("sealed adapter, nv-embed", lambda: steps.sealed("nv-embed", adapter=True))
        for dtype in (torch.bfloat16, torch.float16):
            part(f"nv-embed in {dtype}", lambda dtype=dtype: steps.half("nv-embed", dtype))
        for recipe in ("nv-embed", "llara", "last-token", "multi-vector", "sparse"):
            for arguments in ({}, {"bf16": True}, {"gradient_checkpointing": True}, {"mini_batch_size": 4}):
                part(f"train {recipe} {arguments or ''}", lambda r=recipe, a=arguments: steps.train(r, **a))
        part("train nv-embed, LoRA, bf16", lambda: steps.train("nv-embed", lora=True, bf16=True))
        for recipe in ("llara", "llara-release"):
            part(f"pretext {recipe}", lambda recipe=recipe: steps.train(recipe, pretext=True))
        if compiles:
            part("train last-token, torch_compile", lambda: steps.train("last-token", torch_compile=True))
        part("merge, after what torch_compile left on", steps.merge)
        part("mine", steps.mine)
    return found


if __name__ == "__main__":
    run()
