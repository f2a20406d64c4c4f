"""The named recipes of ``build_model``: what each paper fixes of an embedding model, as data.

A recipe is what follows the LLM, a pooling module or a head (``heads.py``), the default arguments of both, the LoRA of
its paper, the prompts that the model is saved with, and the tokens that it adds. Another recipe is another entry of
``RECIPES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base import BaseModel
from sentence_transformers.base.modules import Module
from sentence_transformers.sentence_transformer.modules import Pooling

from st_llm_embed.heads import token_vectors, vocabulary_weights
from st_llm_embed.modules import LatentAttentionPooling, PromptTokenPooling

# LLaRA's two prompts (arXiv 2312.15503): the embedding is read off the token after them.
EBAE_PROMPT = "{text} The original sentence:"
EBAR_PROMPT = "{text} The next sentence:"

# The prompts of its released code: each ends in eight tokens of its own, added to the tokenizer.
RELEASE_TOKENS = [f"<s{i}>" for i in range(1, 17)]
RELEASE_EBAE_PROMPT = '"{text}", summarize the above passage within eight words: ' + "".join(RELEASE_TOKENS[:8])
RELEASE_EBAR_PROMPT = '"{text}", predict the following passage within eight words: ' + "".join(RELEASE_TOKENS[8:])


@dataclass(frozen=True)
class Recipe:
    """The parts of one way to make an embedding model.

    Args:
        pooling: the class of the pooling module after the LLM, or the function that makes the modules of a head;
            either takes the LLM's width first.
        defaults: the default arguments of ``LLMBackbone`` and of the pooling module.
        lora: the arguments of ``peft.LoraConfig``, but for the names of the adapted maps. None where the paper names
            no LoRA.
        prompts: the model's prompts by name.
        default_prompt_name: the name of the prompt that ``encode`` uses unless told otherwise.
        added_tokens: the special tokens that the LLM gets, each with an embedding of its own.
        model: the class of the model: by what it gives for a text.
        similarity: the name of the model's similarity function.
        has_lm_head: whether a copy of the LLM's LM head comes before the pooling.
    """

    pooling: type[Module] | Callable[..., list[Module]]
    defaults: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    added_tokens: list[str] = field(default_factory=list)
    model: type[BaseModel] = SentenceTransformer
    similarity: str = "cosine"
    has_lm_head: bool = False


def _llara_prompts(ebae: str, ebar: str) -> dict[str, str]:
    """EBAE's prompt for similarity and documents, EBAR's for queries."""
    return {"similarity": ebae, "passage": ebae, "document": ebae, "query": ebar}


RECIPES = {
    # arXiv 2405.17428. Task prompts come with the training data.
    "nv-embed": Recipe(
        pooling=LatentAttentionPooling,
        defaults={"attention": "bidirectional"},
        lora={"r": 16, "lora_alpha": 32, "lora_dropout": 0.1},
    ),
    # arXiv 2312.15503: the paper's variant, and the released code's.
    "llara": Recipe(
        pooling=PromptTokenPooling,
        defaults={"attention": "causal"},
        lora={"r": 64, "lora_alpha": 16, "lora_dropout": 0.1},
        prompts=_llara_prompts(EBAE_PROMPT, EBAR_PROMPT),
        default_prompt_name="similarity",
    ),
    "llara-release": Recipe(
        pooling=PromptTokenPooling,
        defaults={"attention": "causal", "add_eos": False, "num_tokens": 8},
        lora={"r": 64, "lora_alpha": 16, "lora_dropout": 0.1},
        prompts=_llara_prompts(RELEASE_EBAE_PROMPT, RELEASE_EBAR_PROMPT),
        default_prompt_name="similarity",
        added_tokens=RELEASE_TOKENS,
    ),
    "mean": Recipe(pooling=Pooling, defaults={"attention": "bidirectional", "pooling_mode": "mean"}),
    "last-token": Recipe(pooling=Pooling, defaults={"attention": "causal", "pooling_mode": "lasttoken"}),
    # arXiv 2202.08904, SGPT: a causal LLM's later tokens have heard more, and weigh more.
    "weightedmean": Recipe(pooling=Pooling, defaults={"attention": "causal", "pooling_mode": "weightedmean"}),
    # Late interaction: arXiv 2004.12832. The mean over the query's tokens ranks as the sum does, and stays below 1.
    "multi-vector": Recipe(
        pooling=token_vectors,
        defaults={"attention": "bidirectional"},
        model=MultiVectorEncoder,
        similarity="meanmaxsim",
    ),
    # SPLADE, arXiv 2109.10086, over the LLM's LM head.
    "sparse": Recipe(
        pooling=vocabulary_weights,
        defaults={"attention": "bidirectional"},
        model=SparseEncoder,
        similarity="dot",
        has_lm_head=True,
    ),
}
