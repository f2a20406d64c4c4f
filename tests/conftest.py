"""Tiny random LLMs and tokenizers, built in code: no test needs a network or a download."""

from __future__ import annotations

import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed

from st_llm_embed.hub import fresh_python
from st_llm_embed.recipes import RECIPES

CORPUS = [
    "Instruct: Given a question, retrieve passages that answer it\nQuery: how do I parse command line arguments?",
    "The original sentence: the next sentence: summarize the above passage within eight words",
    "Return the sum of all numbers in the list. Raise ValueError if it is empty.",
    "A cat sat on the mat, while seven dogs were barking at the moon and the quick brown fox jumped over them.",
]
# The recipes of one dense vector for a text.
DENSE = [name for name, recipe in RECIPES.items() if recipe.model is SentenceTransformer]
TEXTS = ["the cat sat", "seven dogs were barking at the moon", "", "日本語 café", "a " * 90]


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # two workers on two cores


@pytest.fixture(autouse=True)
def seeded():
    set_seed(0)
    random.seed(0)


def train_tokenizer(byte_level: bool = True, bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level (GPT-like) or metaspace (SentencePiece-like) BPE; EOS is for the backbone to add."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=not byte_level, unk_token=None if byte_level else "<unk>"))
    special = ["<unk>", "<s>", "</s>"]
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])
        alphabet, special = [], [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def save_llm(folder: Path, config=None, tokenizer: PreTrainedTokenizerFast | None = None, **changes) -> str:
    """A random decoder-only LLM (a two-layer Llama unless told otherwise) with its tokenizer, as a folder."""
    tokenizer = tokenizer or train_tokenizer()
    if config is None:
        shape = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        }
        config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **{**shape, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", autouse=True)
def one_fresh_python():
    """All checks of a worker share a process without this package: its start takes ten seconds here."""
    with fresh_python():
        yield


@pytest.fixture(scope="session")
def llm(tmp_path_factory) -> str:
    """A tiny Llama with a byte-level tokenizer."""
    torch.manual_seed(0)
    return save_llm(tmp_path_factory.mktemp("llm") / "tiny-llama")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The workplace's folder of oracles; absent on a user's machine."""
    folder = Path(os.environ.get("ST_LLM_EMBED_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"the original code's outputs are not at {folder} (set ST_LLM_EMBED_SHARED)")
    return folder
