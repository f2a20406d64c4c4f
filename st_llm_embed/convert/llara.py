"""Published LLaRA checkpoints (arXiv 2312.15503) to a sealed model folder.

BAAI/LLARA-pretrain, -passage, -document and -beir are plain Llamas with sixteen added tokens. Their weights are
written as they are, without an LM head; what is added is what their code does around them: left padding, the two
quoted prompts, the mean over a prompt's eight tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from st_llm_embed.convert.checkpoint import (
    check_tensors,
    copy_shards,
    find_shards,
    local_checkpoint,
    meta_shapes,
    write_card,
    write_modules,
)
from st_llm_embed.files import check_empty, check_room, write_json, written_beside
from st_llm_embed.hub import seal
from st_llm_embed.modules import LLMBackbone, PromptTokenPooling
from st_llm_embed.recipes import RECIPES, RELEASE_TOKENS
from st_llm_embed.trust import forget_code, loading

# Of the LM head, and of buffers that older versions of transformers saved.
NOT_THE_BACKBONES = ("lm_head.weight", ".rotary_emb.inv_freq")
CARD = """# LLaRA, converted for sentence-transformers 6

The weights of {name}, unchanged, converted with st-llm-embed, which is not needed to load them. The licence is the
original's.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder", trust_remote_code=True)
queries = model.encode_query(["how do I parse command line arguments?"])
documents = model.encode_document(["argparse parses command lines"])
print(model.similarity(queries, documents))
```

Queries and documents get LLaRA's prompts around them; texts to compare with each other get `prompt_name="similarity"`.
"""


def convert_llara(source: str | Path, output: str | Path) -> Path:
    """Write a published LLaRA checkpoint as a sealed model folder.

    Args:
        source: a local folder, or a Hub id.
        output: the folder to write; must not exist, or be empty.

    Returns:
        ``output``. It loads with ``SentenceTransformer(output, trust_remote_code=True)``. To adapt it further, give
        ``PretextLoss`` the LM head of ``AutoModelForCausalLM.from_pretrained(source)``, where it has one.

    Raises:
        FileExistsError: if ``output`` holds something.
        OSError: if ``output`` cannot be written, or its disk has no room for the model.
        FileNotFoundError: if files of the checkpoint are missing, as after half a download.
        ValueError: if it lacks LLaRA's sixteen tokens, or a tensor is unknown, missing, or of another shape than the
            configuration says.
    """
    target = Path(output).resolve()
    check_empty(target)
    root = local_checkpoint(source)
    with loading(root):
        # False, for by default transformers asks on standard input.
        config = AutoConfig.from_pretrained(root, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(root, padding_side="left", trust_remote_code=False)
    if missing := sorted(set(RELEASE_TOKENS) - set(tokenizer.get_vocab())):
        raise ValueError(
            f"The tokenizer of {root} lacks {', '.join(missing)}, so it is no LLaRA checkpoint. Make one of an "
            f"ordinary LLM with build_model({str(source)!r}, 'llara-release')."
        )
    shards = find_shards(root)
    with torch.device("meta"):
        llm = AutoModel.from_config(config)
    prefix = f"{llm.base_model_prefix}."
    check_tensors(shards, meta_shapes(llm), lambda name: name.removeprefix(prefix), NOT_THE_BACKBONES)
    check_room(target, sum(shard.stat().st_size for shard in shards))
    with written_beside(target) as staged:
        staged.mkdir()
        copy_shards(shards, staged, _without_head)
        config.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        for name in ("config.json", "tokenizer_config.json"):
            forget_code(staged / name)
        recipe = RECIPES["llara-release"]
        write_modules(
            staged,
            {"": LLMBackbone, "1_PromptTokenPooling": PromptTokenPooling, "2_Normalize": Normalize},
            {"attention": "causal", "window": "keep", "add_eos": False, "instruction_mask": "exact"},
            {"prompts": recipe.prompts, "default_prompt_name": recipe.default_prompt_name},
        )
        pooling = {"embedding_dimension": config.hidden_size, "num_tokens": recipe.defaults["num_tokens"]}
        write_json(staged / "1_PromptTokenPooling" / "config.json", pooling)
        seal(staged)
        _write_card(root, staged, str(source))
    return target


def _without_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(NOT_THE_BACKBONES)}


def _write_card(root: Path, folder: Path, source: str) -> None:
    metadata: dict[str, Any] = {}
    if (root / "README.md").is_file():
        metadata = {"license": ModelCard.load(root / "README.md", ignore_metadata_errors=True).data.license}
    if not Path(source).is_dir():
        metadata["base_model"] = source
    name = Path(source).name if Path(source).is_dir() else f"[{source}](https://huggingface.co/{source})"
    write_card(folder, CARD.format(name=name), "llara", **metadata)
