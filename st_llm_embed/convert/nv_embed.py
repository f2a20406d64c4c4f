"""NV-Embed v1 and v2 (arXiv 2405.17428), as published, to a sealed model folder; their own code is never run.

The published weights need transformers 4.42.4 and ``trust_remote_code``. Here their tensors are renamed, and what
their code does is said in settings: no causal mask and no window, EOS added before truncation, the instruction counted
their way, latent attention, the mean. The result is a plain SentenceTransformer, to encode with and to fine-tune.

Tensors are checked by name and shape before anything is written, and copied one shard at a time, in their precision.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from transformers import AutoModel, MistralConfig, PreTrainedTokenizerFast

from st_llm_embed.hub import demand_empty, seal, written_beside
from st_llm_embed.modules import LatentAttentionPooling, LLMBackbone

LICENSE = "cc-by-nc-4.0"
QUERY_PROMPT = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "
FILES = ["*.json", "*.safetensors", "tokenizer.model", "1_Pooling/*.json"]  # no *.py, no *.bin
BACKBONE, LATENT = "embedding_model.", "latent_attention_model."
LATENT_NAMES = {
    "cross_attend_blocks.0.fn.": "",
    "cross_attend_blocks.0.norm_context": "latent_norm",
    "cross_attend_blocks.0.norm": "token_norm",
    "cross_attend_blocks.1.fn.net.0": "mlp_in",
    "cross_attend_blocks.1.fn.net.2": "mlp_out",
    "cross_attend_blocks.1.norm": "mlp_norm",
}
CARD = """# {name}, converted for sentence-transformers 6

The weights of [{name}](https://huggingface.co/{name}) under other names, converted with st-llm-embed, which is not
needed to load them. **They are licensed under CC-BY-NC-4.0: no commercial use.**

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder", trust_remote_code=True)
queries = model.encode_query(["how do I parse command line arguments?"])
documents = model.encode_document(["argparse parses command lines"])
print(model.similarity(queries, documents))
```

Queries get the prompt `{prompt}`, documents none. For another task, give `prompt="Instruct: <task>\\nQuery: "`.
"""


def convert_nv_embed(source: str | Path, output: str | Path) -> Path:
    """Write a published NV-Embed checkpoint as a sealed model folder.

    Args:
        source: a local folder in the layout of ``nvidia/NV-Embed-v2``, or a Hub id (read without its code).
        output: the folder to write; must not exist, or be empty.

    Returns:
        ``output``. It loads with ``SentenceTransformer(output, trust_remote_code=True)``, in the precision of the
        source unless ``model_kwargs={"dtype": ...}`` says otherwise.

    Raises:
        FileExistsError: if ``output`` holds something.
        FileNotFoundError: if files of the checkpoint are missing, as after half a download.
        ValueError: if it is not an NV-Embed checkpoint in safetensors format, or a tensor is unknown, missing, or of
            another shape than the configuration says.
    """
    target = Path(output).resolve()
    demand_empty(target)
    root = Path(source) if Path(source).is_dir() else Path(snapshot_download(str(source), allow_patterns=FILES))
    settings = _read_settings(root)
    shards = _shards(root)
    text_config, latent = _llm_config(settings), _latent_arguments(settings)
    _check_tensors(shards, text_config, latent)
    with written_beside(target) as staged:
        staged.mkdir()
        text_config.dtype = _copy_tensors(shards, staged, staged / "1_LatentAttentionPooling")
        text_config.save_pretrained(staged)
        _save_tokenizer(root, settings, staged)
        _write_modules(root, staged, settings, latent)
        seal(staged)
        _write_card(staged, settings)
    return target


def load_nv_embed(source: str | Path, **kwargs: Any) -> SentenceTransformer:
    """Load a published NV-Embed checkpoint. It is converted into a temporary folder, which needs as much disk as the
    checkpoint: to load it more than once, keep what ``convert_nv_embed`` writes.

    Args:
        source: as for ``convert_nv_embed``.
        **kwargs: arguments of ``SentenceTransformer``, such as ``model_kwargs={"dtype": "float32"}`` or ``device``.
    """
    with tempfile.TemporaryDirectory() as folder:
        converted = convert_nv_embed(source, Path(folder) / "model")
        return SentenceTransformer(str(converted), trust_remote_code=True, **kwargs)


def _read_settings(root: Path) -> dict[str, Any]:
    file = root / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{root} has no config.json. Download the whole repository.")
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("model_type") != "nvembed":
        raise ValueError(
            f"{root} holds a {settings.get('model_type')!r} model. Convertible are those of model_type 'nvembed' "
            "(nvidia/NV-Embed-v1 and -v2); use build_model for an ordinary LLM."
        )
    return settings


def _shards(root: Path) -> list[Path]:
    index = root / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if escaping := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index} names files outside its folder: {escaping}.")
    elif (root / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        found = sorted(file.name for file in root.glob("*.bin"))
        raise ValueError(
            f"{root} has no model.safetensors"
            + (f", only {found}, which may run code when read" if found else "")
            + ". Download the safetensors files."
        )
    if missing := [name for name in names if not (root / name).is_file()]:
        raise FileNotFoundError(f"{root} lacks {missing}. Finish the download.")
    return [root / name for name in names]


def _llm_config(settings: dict[str, Any]) -> MistralConfig:
    """An ordinary Mistral configuration that makes any host bidirectional, without a window."""
    known = set(MistralConfig().to_dict()) - {"architectures", "dtype", "transformers_version", "rope_parameters"}
    given = {key: value for key, value in settings["text_config"].items() if key in known}
    theta = settings["text_config"].get("rope_theta", 10000.0)
    config = MistralConfig(
        **{**given, "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    )
    config.is_causal = False
    config.architectures = ["MistralModel"]
    return config


def _latent_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """The released file may say no more than the model type: then the class's defaults hold."""
    latent = settings.get("latent_attention_config", {})
    return {
        "embedding_dimension": settings["text_config"]["hidden_size"],
        "num_latents": latent.get("num_latents_value", 512),
        "num_heads": latent.get("num_cross_heads", 8),
        "head_dim": latent.get("cross_dim_head", 4096),
        "mlp_ratio": 4,
        "include_prompt": not settings.get("is_mask_instruction", True),
        "normalize": False,
    }


def _new_name(name: str) -> tuple[str, str] | None:
    """A published tensor's part and name here: ``("", name)`` for the LLM, or None if it is not known."""
    if name.startswith(BACKBONE):
        return BACKBONE, name.removeprefix(BACKBONE)
    if name.startswith(LATENT):
        name = name.removeprefix(LATENT)
        for theirs, ours in LATENT_NAMES.items():
            name = name.replace(theirs, ours)
        return LATENT, name
    return None


def _check_tensors(shards: list[Path], config: MistralConfig, latent: dict[str, Any]) -> None:
    """Names and shapes against those of the modules that will load them."""
    with torch.device("meta"):
        expected = {(BACKBONE, k): v.shape for k, v in AutoModel.from_config(config).state_dict().items()}
        expected |= {(LATENT, k): v.shape for k, v in LatentAttentionPooling(**latent).state_dict().items()}
    unknown, found, wrong = [], set(), []
    for name, shape in _names_and_shapes(shards):
        new = _new_name(name)
        if new not in expected:
            unknown.append(name)
            continue
        found.add(new)
        if tuple(expected[new]) != tuple(shape):
            wrong.append(f"{name} is {tuple(shape)}, not {tuple(expected[new])}")
    missing = ["".join(new) for new in expected if new not in found]
    problems = [
        f"{what}: {', '.join(sorted(names))}"
        for what, names in (("unknown tensors", unknown), ("missing tensors", missing), ("wrong shapes", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"{shards[0].parent} does not fit its config.json. " + "; ".join(problems) + ".")


def _names_and_shapes(shards: list[Path]) -> Iterator[tuple[str, list[int]]]:
    for shard in shards:
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_slice(name).get_shape()


def _copy_tensors(shards: list[Path], backbone: Path, pooling: Path) -> str:
    """One shard of the LLM for each of the source's, and the latent layer in a file of its own; give the dtype."""
    pooling.mkdir()
    latent, weight_map, size = {}, {}, 0
    for number, shard in enumerate(shards, 1):
        part = {}
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():
                where, new = _new_name(name)
                (part if where == BACKBONE else latent)[new] = tensors.get_tensor(name)
        if part:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            save_file(part, backbone / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
            size += sum(tensor.nbytes for tensor in part.values())
            dtype = str(next(iter(part.values())).dtype).removeprefix("torch.")
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (backbone / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    save_file(latent, pooling / "model.safetensors", {"format": "pt"})
    return dtype


def _save_tokenizer(root: Path, settings: dict[str, Any], folder: Path) -> None:
    """The released tokenizer.json to the letter: AutoTokenizer would replace its normaliser."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root)
    tokenizer.padding_side = settings.get("padding_side", "right")
    if settings.get("add_pad_token", True):
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)


def _write_modules(root: Path, folder: Path, settings: dict[str, Any], latent: dict[str, Any]) -> None:
    source = root / "sentence_bert_config.json"
    longest = json.loads(source.read_text(encoding="utf-8"))["max_seq_length"] if source.is_file() else None
    types = {"": LLMBackbone, "1_LatentAttentionPooling": LatentAttentionPooling, "2_Normalize": Normalize}
    contents: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"{module.__module__}.{module.__qualname__}"}
            for i, (path, module) in enumerate(types.items())
        ],
        "sentence_bert_config.json": {
            "max_seq_length": longest or settings["text_config"]["max_position_embeddings"],
            "attention": "bidirectional",
            "window": "full",
            "add_eos": "nv-embed" if settings.get("add_eos", True) else False,
            "instruction_mask": "nv-embed",
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {"query": QUERY_PROMPT, "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "1_LatentAttentionPooling/config.json": latent,
    }
    (folder / "2_Normalize").mkdir()
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_card(folder: Path, settings: dict[str, Any]) -> None:
    name = settings.get("_name_or_path") or "nvidia/NV-Embed-v2"
    tags = ["sentence-transformers", "feature-extraction", "sentence-similarity", "nv-embed"]
    data = ModelCardData(
        license=LICENSE,
        base_model=name,
        library_name="sentence-transformers",
        tags=tags,
        pipeline_tag="sentence-similarity",
        language="en",
    )
    text = CARD.format(name=name, prompt=QUERY_PROMPT.replace("\n", "\\n"))
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")
