"""Write a tiny sealed folder and its vectors, with the version of this package that is checked out."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import TEXTS, save_llm

from st_llm_embed import __version__, build_model
from st_llm_embed.hub import save_sealed


def main() -> None:
    for recipe, changes in (("nv-embed", {"num_latents": 8}), ("llara", {})):
        target = Path(__file__).with_name(f"{recipe}-{__version__}")
        with tempfile.TemporaryDirectory() as temporary:
            torch.manual_seed(0)
            base = save_llm(Path(temporary) / "base", hidden_size=16, intermediate_size=32)
            model = build_model(base, recipe, **changes)
            if recipe == "nv-embed":
                model.prompts["query"] = "Instruct: find it\nQuery: "
            folder = save_sealed(model, Path(temporary) / target.name)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder, target)
        vectors = {name: model.encode(TEXTS, prompt=prompt).tolist() for name, prompt in model.prompts.items()}
        target.with_name(f"{target.name}.json").write_text(json.dumps(vectors) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
