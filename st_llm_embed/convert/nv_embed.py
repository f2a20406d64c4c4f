"""NV-Embed v1 and v2 (arXiv 2405.17428), as published, to a sealed model folder; their own code is never run.

The published weights need transformers 4.42.4 and ``trust_remote_code``. Here their tensors are renamed, and what
their code does is said in settings: no causal mask and no window, EOS added before truncation, the instruction counted
their way, latent attention, the mean. The result is a plain SentenceTransformer, to encode with and to fine-tune.

Tensors are checked by name and shape before anything is written, and copied one shard at a time, in their precision.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import Size, Tensor
from transformers import AutoModel, MistralConfig, PreTrainedTokenizerFast

from st_llm_embed.convert.checkpoint import (
    check_tensors,
    copy_shards,
    find_shards,
    local_checkpoint,
    meta_shapes,
    write_card,
    write_modules,
)
from st_llm_embed.files import check_empty, check_room, read_json, write_json, written_beside
from st_llm_embed.hub import seal
from st_llm_embed.modules import LatentAttentionPooling, LLMBackbone
from st_llm_embed.trust import forget_code, load_trusted, loading

LICENSE = "cc-by-nc-4.0"
QUERY_PROMPT = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "
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
        OSError: if ``output`` cannot be written, or its disk has no room for the model.
        FileNotFoundError: if files of the checkpoint are missing, as after half a download.
        ValueError: if it is not an NV-Embed checkpoint, or a tensor is unknown, missing, or of
            another shape than the configuration says.
    """
    target = Path(output).resolve()
    check_empty(target)
    root = local_checkpoint(source)
    settings = read_json(root / "config.json")
    _check_nv_embed(root, settings)
    shards = find_shards(root)
    text_config, latent = _llm_config(settings), _latent_arguments(settings)
    check_tensors(shards, _expected_tensors(text_config, latent), _new_name)
    check_room(target, sum(shard.stat().st_size for shard in shards))
    with written_beside(target) as staged:
        staged.mkdir()
        text_config.dtype = _copy_tensors(shards, staged, staged / "1_LatentAttentionPooling")
        text_config.save_pretrained(staged)
        _save_tokenizer(root, settings, staged)
        _write_modules(root, staged, settings, latent)
        seal(staged)
        _write_card(staged, settings, str(source))
    return target


def load_nv_embed(source: str | Path, **kwargs: Any) -> SentenceTransformer:
    """Load a published NV-Embed checkpoint. It is converted into a temporary folder, which needs as much disk as the
    checkpoint: to load it more than once, keep what ``convert_nv_embed`` writes.

    Args:
        source: a local folder or a Hub id, as for ``convert_nv_embed``.
        **kwargs: further arguments of ``SentenceTransformer``, such as ``model_kwargs={"dtype": "float32"}`` or
            ``device``.

    Raises:
        OSError, ValueError: as ``convert_nv_embed`` does.
    """
    with tempfile.TemporaryDirectory() as folder:
        converted = convert_nv_embed(source, Path(folder) / "model")
        model = load_trusted(converted, **kwargs)
    model.transformers_model.name_or_path = ""  # which no adapter could load: its base is saved with it
    return model


def _check_nv_embed(root: Path, settings: dict[str, Any]) -> None:
    if settings.get("model_type") != "nvembed":
        raise ValueError(
            f"{root} holds a {settings.get('model_type')!r} model. Convertible are those of model_type 'nvembed' "
            "(nvidia/NV-Embed-v1 and -v2); use build_model for an ordinary LLM."
        )
    sizes = settings.get("text_config")
    if not isinstance(sizes, dict) or not {"hidden_size", "max_position_embeddings"} <= sizes.keys():
        raise ValueError(f"{root / 'config.json'} has no text_config with the LLM's sizes. Download the whole file.")


def _llm_config(settings: dict[str, Any]) -> MistralConfig:
    """An ordinary Mistral configuration that makes any host bidirectional, without a window."""
    fields = set(MistralConfig().to_dict()) - {"architectures", "dtype", "transformers_version", "rope_parameters"}
    llm_settings = {key: value for key, value in settings["text_config"].items() if key in fields}
    theta = settings["text_config"].get("rope_theta", 10000.0)
    config = MistralConfig(
        **{**llm_settings, "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
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
    """A published tensor's part, ``BACKBONE`` or ``LATENT``, and its name here; None if it is not known."""
    if name.startswith(BACKBONE):
        return BACKBONE, name.removeprefix(BACKBONE)
    if name.startswith(LATENT):
        name = name.removeprefix(LATENT)
        for old, new in LATENT_NAMES.items():
            name = name.replace(old, new)
        return LATENT, name
    return None


def _expected_tensors(config: MistralConfig, latent: dict[str, Any]) -> dict[tuple[str, str], Size]:
    with torch.device("meta"):
        llm, pooling = AutoModel.from_config(config), LatentAttentionPooling(**latent)
    return {(BACKBONE, name): shape for name, shape in meta_shapes(llm).items()} | {
        (LATENT, name): shape for name, shape in meta_shapes(pooling).items()
    }


def _copy_tensors(shards: list[Path], backbone: Path, pooling: Path) -> str:
    """Write the LLM shard by shard, and the latent layer in a file of its own; give the dtype of most of the LLM."""
    latent: dict[str, Tensor] = {}
    dtypes: Counter[torch.dtype] = Counter()

    def llm_only(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {new: tensor for name, tensor in tensors.items() if (new := _new_name(name))}
        latent.update({name: tensor for (part, name), tensor in named.items() if part == LATENT})
        llm = {name: tensor for (part, name), tensor in named.items() if part == BACKBONE}
        for tensor in llm.values():
            dtypes[tensor.dtype] += tensor.numel()
        return llm

    copy_shards(shards, backbone, llm_only)
    pooling.mkdir()
    save_file(latent, pooling / "model.safetensors", {"format": "pt"})
    return str(dtypes.most_common(1)[0][0]).removeprefix("torch.")


def _save_tokenizer(root: Path, settings: dict[str, Any], folder: Path) -> None:
    """Write the released tokenizer.json to the letter: AutoTokenizer would replace its normaliser."""
    with loading(root):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(root)
    tokenizer.padding_side = settings.get("padding_side", "right")
    if settings.get("add_pad_token", True):
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    forget_code(folder / "tokenizer_config.json")


def _write_modules(root: Path, folder: Path, settings: dict[str, Any], latent: dict[str, Any]) -> None:
    source = root / "sentence_bert_config.json"
    longest = read_json(source)["max_seq_length"] if source.is_file() else None
    write_modules(
        folder,
        {"": LLMBackbone, "1_LatentAttentionPooling": LatentAttentionPooling, "2_Normalize": Normalize},
        {
            "max_seq_length": longest or settings["text_config"]["max_position_embeddings"],
            "attention": "bidirectional",
            "window": "full",
            "add_eos": "nv-embed" if settings.get("add_eos", True) else False,
            "instruction_mask": "nv-embed",
        },
        {"prompts": {"query": QUERY_PROMPT, "document": ""}, "default_prompt_name": None},
    )
    write_json(folder / "1_LatentAttentionPooling" / "config.json", latent)


def _write_card(folder: Path, settings: dict[str, Any], source: str) -> None:
    """Write the card. Of a folder it names the release: what its config.json says may be a path of this machine."""
    release = re.search(r"NV-Embed-v\d", settings.get("_name_or_path") or "")
    name = source if not Path(source).is_dir() else f"nvidia/{release[0] if release else 'NV-Embed-v2'}"
    text = CARD.format(name=name, prompt=QUERY_PROMPT.replace("\n", "\\n"))
    write_card(folder, text, "nv-embed", license=LICENSE, base_model=name, language="en")
