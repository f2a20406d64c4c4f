"""A published checkpoint as files: where it is, its shards, whether its tensors are those of a model, written modules.

Nothing of it is run: no remote code is fetched, pickled weights are read as tensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open
from safetensors.torch import save_file
from sentence_transformers.base.modules.module import Module
from torch import Size, Tensor
from transformers.modeling_utils import load_state_dict

from st_llm_embed.files import read_json, write_json
from st_llm_embed.trust import fetch

FILES = ["*.json", "*.safetensors", "tokenizer.model", "README.md"]  # no *.py


def local_checkpoint(source: str | Path) -> Path:
    """The folder ``source``, or where the Hub's repository of that name was downloaded to.

    Raises:
        FileNotFoundError: if it has no config.json.
    """
    root = fetch(source, only=FILES, pickles=True)
    if not Path(source).is_dir() and not any(root.glob("*.safetensors")):
        root = fetch(source, only=[*FILES, "*.bin"], pickles=True)
    if not (root / "config.json").is_file():
        raise FileNotFoundError(f"{root} has no config.json. Download the whole repository.")
    return root


def is_nv_embed(source: str | Path) -> bool:
    """Is a published checkpoint, a folder or a Hub id, one of NV-Embed?"""
    return read_json(local_checkpoint(source) / "config.json").get("model_type") == "nvembed"


def find_shards(root: Path) -> list[Path]:
    """The files of a checkpoint's weights: safetensors, or else PyTorch's pickles.

    Raises:
        ValueError: if there are none, or the index names files outside the folder.
        FileNotFoundError: if the index names files that are not there.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = root / f"{single}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            break
        if (root / single).is_file():
            names = [single]
            break
    else:
        raise ValueError(f"{root} has neither model.safetensors nor pytorch_model.bin. Download the weights.")
    if escaping := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names files outside its folder: {escaping}.")
    if missing := [name for name in names if not (root / name).is_file()]:
        raise FileNotFoundError(f"{root} lacks {missing}. Finish the download.")
    return [root / name for name in names]


def names_and_shapes(shards: list[Path]) -> Iterator[tuple[str, Size]]:
    """The name and shape of every tensor, without reading the weights of safetensors."""
    for shard in shards:
        if shard.suffix == ".safetensors":
            with safe_open(shard, framework="pt") as tensors:
                for name in tensors.keys():
                    yield name, Size(tensors.get_slice(name).get_shape())
        else:
            yield from ((name, tensor.shape) for name, tensor in load_state_dict(str(shard)).items())


def check_tensors(
    shards: list[Path], expected: Mapping[Any, Size], new_name: Callable[[str], Any], ignored: tuple[str, ...] = ()
) -> None:
    """Check the names and shapes of a checkpoint against those of the modules that will load it.

    Args:
        shards: the files of the checkpoint's weights.
        expected: the shape of every tensor, by its name here.
        new_name: a function from a tensor's published name to its name here.
        ignored: the endings of published names that may be there and do not count.

    Raises:
        ValueError: naming the tensors that are unknown, missing or of another shape.
    """
    unknown, present, wrong_shapes = [], set(), []
    for name, shape in names_and_shapes(shards):
        new = new_name(name)
        if new in expected:
            present.add(new)
            if expected[new] != shape:
                wrong_shapes.append(f"{name} is {tuple(shape)}, not {tuple(expected[new])}")
        elif not name.endswith(ignored):
            unknown.append(name)
    missing = ["".join(new) for new in expected if new not in present]
    problems = [
        f"{problem}: {', '.join(sorted(names))}"
        for problem, names in (
            ("unknown tensors", unknown),
            ("missing tensors", missing),
            ("wrong shapes", wrong_shapes),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{shards[0].parent} does not fit its config.json. " + "; ".join(problems) + ".")


def copy_shards(shards: list[Path], folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Write one safetensors file for each of the source's, one at a time in memory, in the source's precision.

    Args:
        shards: the files of the source's weights.
        folder: the folder to write to.
        change: a function from the tensors of a shard, by name, to those to write in their place.
    """
    weight_map: dict[str, str] = {}
    size = 0  # bytes
    for number, shard in enumerate(shards, 1):
        # Tensors of a pickle may share memory. What else a pickle holds is refused by PyTorch.
        part = {name: tensor.clone().contiguous() for name, tensor in change(load_state_dict(str(shard))).items()}
        if part:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
            size += sum(tensor.nbytes for tensor in part.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def meta_shapes(module: torch.nn.Module) -> dict[str, Size]:
    """The shape of every tensor of a module, by name."""
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def write_modules(
    folder: Path, modules: Mapping[str, type[Module]], backbone: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Write the files that sentence-transformers needs beside the weights.

    Args:
        folder: the model's folder.
        modules: the class of each module by its sub-folder, which is the empty string for the backbone.
        backbone: the backbone's arguments.
        settings: the settings of the whole model for ``config_sentence_transformers.json``: ``prompts`` and
            ``default_prompt_name``.
    """
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"{module.__module__}.{module.__qualname__}"}
        for i, (path, module) in enumerate(modules.items())
    ]
    for path in modules:
        (folder / path).mkdir(exist_ok=True)
    model_settings = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine", **settings}
    contents = {"modules": entries, "sentence_bert_config": backbone, "config_sentence_transformers": model_settings}
    for name, content in contents.items():
        write_json(folder / f"{name}.json", content)


def write_card(folder: Path, text: str, recipe: str, **metadata: Any) -> None:
    """Write the README.md of a converted model.

    Args:
        folder: the model's folder.
        text: the card's text in Markdown.
        recipe: the name of the recipe, a tag beside those of every text-embedding model.
        **metadata: the card's metadata, such as ``license`` and ``base_model``.
    """
    data = ModelCardData(
        library_name="sentence-transformers",
        tags=["sentence-transformers", "feature-extraction", "sentence-similarity", recipe],
        pipeline_tag="sentence-similarity",
        **metadata,
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")
