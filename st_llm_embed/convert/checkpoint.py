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

from st_llm_embed.hub.folders import write_json
from st_llm_embed.hub.trust import fetch, read_json

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


def find_shards(root: Path) -> list[Path]:
    """The files of its weights: safetensors, or else PyTorch's pickles.

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
    """Of every tensor, without reading the weights of safetensors."""
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
    """Names and shapes of a checkpoint against those of the modules that will load it.

    Args:
        shards: its files.
        expected: the shape of every tensor, by its name here.
        new_name: a published name's name here.
        ignored: endings of published names that may be there and do not count.

    Raises:
        ValueError: naming the tensors that are unknown, missing or of another shape.
    """
    unknown, found, wrong = [], set(), []
    for name, shape in names_and_shapes(shards):
        new = new_name(name)
        if new in expected:
            found.add(new)
            if expected[new] != shape:
                wrong.append(f"{name} is {tuple(shape)}, not {tuple(expected[new])}")
        elif not name.endswith(ignored):
            unknown.append(name)
    missing = ["".join(new) for new in expected if new not in found]
    problems = [
        f"{what}: {', '.join(sorted(names))}"
        for what, names in (("unknown tensors", unknown), ("missing tensors", missing), ("wrong shapes", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"{shards[0].parent} does not fit its config.json. " + "; ".join(problems) + ".")


def copy_shards(shards: list[Path], folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Write one safetensors file for each of the source's, one at a time in memory, in the source's precision.

    Args:
        shards: the source's files.
        folder: where to write.
        change: gives the tensors to write for those of a shard.
    """
    weight_map, size = {}, 0
    for number, shard in enumerate(shards, 1):
        # Tensors of a pickle may share memory. What else a pickle holds is refused by PyTorch.
        part = {name: t.clone().contiguous() for name, t in change(load_state_dict(str(shard))).items()}
        if part:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
            size += sum(tensor.nbytes for tensor in part.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def meta_shapes(module: torch.nn.Module) -> dict[str, Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def write_modules(
    folder: Path, modules: Mapping[str, type[Module]], backbone: dict[str, Any], settings: dict[str, Any]
) -> None:
    """What sentence-transformers needs beside the weights.

    Args:
        folder: the model's folder.
        modules: each module's sub-folder, the backbone's being the empty string, and class.
        backbone: the backbone's arguments.
        settings: of ``config_sentence_transformers.json``: ``prompts`` and ``default_prompt_name``.
    """
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"{module.__module__}.{module.__qualname__}"}
        for i, (path, module) in enumerate(modules.items())
    ]
    for path in modules:
        (folder / path).mkdir(exist_ok=True)
    host = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine", **settings}
    contents = {"modules": entries, "sentence_bert_config": backbone, "config_sentence_transformers": host}
    for name, content in contents.items():
        write_json(folder / f"{name}.json", content)


def write_card(folder: Path, text: str, recipe: str, **metadata: Any) -> None:
    """The README.md of a converted model.

    Args:
        folder: the model's.
        text: Markdown.
        recipe: a tag beside those of every text-embedding model.
        **metadata: such as ``license`` and ``base_model``.
    """
    data = ModelCardData(
        library_name="sentence-transformers",
        tags=["sentence-transformers", "feature-extraction", "sentence-similarity", recipe],
        pipeline_tag="sentence-similarity",
        **metadata,
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")
