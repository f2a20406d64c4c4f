"""Whoever gives texts vectors: a model here, under one prompt, in batches of a number of tokens.

A shard of texts is sorted by length and cut into batches of at most ``tokens_per_batch`` tokens, padding included.
Short texts come many at once and long ones few: little is spent on padding, and a batch stays in a CPU's cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model import BaseModel
from tokenizers import Tokenizer
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from st_llm_embed.tasks import DOCUMENT, QUERY, TEXT, prompt_of

Side = Literal["query", "document", "text"]
SIDES: tuple[Side, ...] = ("query", "document", "text")
TOKENS_PER_BATCH = {"cpu": 2_048}
TOKENS_ON_ACCELERATOR = 32_768
ORIGINS = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
CHARACTERS = 4  # of a token, where no tokenizer counts them


def _nobody(count: int) -> None:
    """Hears how many texts are done."""


class TextEncoder(Protocol):
    """Whoever gives texts vectors of one space.

    Args:
        identity: sixteen hexadecimal digits that name everything that its vectors depend on.
        description: what it is, in a manifest: model, prompt, precision.
        longest: the number of tokens after which a text is cut, or None.
    """

    identity: str
    description: dict[str, Any]
    longest: int | None

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray:
        """``(texts,)``: the tokens of each text under the prompt, before it is cut."""

    def encode(self, texts: Sequence[str], done: Callable[[int], None] = _nobody) -> np.ndarray:
        """``(texts, dim)`` in float32. ``done`` hears of every batch how many texts it had."""


class ModelEncoder:
    """A model of sentence-transformers as it encodes queries, documents, or texts of one sort.

    Args:
        model: any text model of sentence-transformers; its weights are hashed here.
        side: whether ``encode_query``, ``encode_document`` or ``encode`` gives the vectors.
        prompt: the prompt. Default: the model's own for the side.
        tokens_per_batch: the number of tokens in a batch, padding included. Default: 2,048 on a CPU, 32,768 elsewhere.
        name: the name of the model in a manifest.
        model_hash: what ``hash_of`` the model gives, where it is known.

    Raises:
        ValueError: for an unknown side, and a batch of no token.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        side: Side = "document",
        prompt: str | None = None,
        tokens_per_batch: int | None = None,
        name: str | None = None,
        model_hash: str | None = None,
    ) -> None:
        if side not in SIDES:
            raise ValueError(f"side={side!r} is unknown. Valid values: {', '.join(SIDES)}.")
        if tokens_per_batch is not None and tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch={tokens_per_batch} must be at least 1.")
        self.model = model
        self.side = side
        self.prompt = side_prompt(side, model.prompts, model.default_prompt_name) if prompt is None else prompt
        self.tokens_per_batch = tokens_per_batch or tokens_for(model)
        self.longest = model.max_seq_length
        self.description = {"model": name, "side": side, "prompt": self.prompt, "dtype": str(model.dtype)[6:]}
        self.identity = hashlib.sha256(f"{model_hash or hash_of(model)} {side} {self.prompt!r}".encode()).hexdigest()[
            :16
        ]

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray:
        return count_tokens(self.model, texts, self.prompt)

    def encode(self, texts: Sequence[str], done: Callable[[int], None] = _nobody) -> np.ndarray:
        return encode_texts(self.model, texts, self.side, self.prompt, self.tokens_per_batch, done)


def encode_texts(
    model: SentenceTransformer,
    texts: Sequence[str],
    side: Side,
    prompt: str | None = None,
    tokens_per_batch: int | None = None,
    done: Callable[[int], None] = _nobody,
) -> np.ndarray:
    """``(texts, dim)`` in float32: what ``encode_query``, ``encode_document`` or ``encode`` gives them.

    Args:
        model, side, prompt, tokens_per_batch: see ``ModelEncoder``.
        texts: the texts.
        done: hears of every batch how many texts it had.
    """
    encode = {"query": model.encode_query, "document": model.encode_document, "text": model.encode}[side]
    lengths = count_tokens(model, texts, prompt or "")
    if model.max_seq_length is not None:
        lengths = lengths.clip(max=model.max_seq_length)
    vectors: np.ndarray | None = None
    for rows in batches(lengths, tokens_per_batch or tokens_for(model)):
        batch = [texts[row] for row in rows]
        found = encode(batch, prompt=prompt, batch_size=len(batch), show_progress_bar=False)
        if vectors is None:
            vectors = np.empty((len(texts), found.shape[1]), np.float32)
        vectors[rows] = found
        done(len(batch))
    return np.empty((0, model.get_embedding_dimension() or 0), np.float32) if vectors is None else vectors


def tokens_for(model: BaseModel) -> int:
    """The tokens of a batch that suit the model's device."""
    return TOKENS_PER_BATCH.get(model.device.type, TOKENS_ON_ACCELERATOR)


def count_tokens(model: BaseModel, texts: Sequence[str], prompt: str = "") -> np.ndarray:
    """``(texts,)``: the tokens of each text under the prompt, before it is cut; where the model has no tokenizer of
    transformers, a fourth of its characters."""
    tokenizer = model.tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return about_tokens(texts)
    prefix, template, suffix = prompt.partition(TEXT)
    apart = [suffix]
    if template and prefix and not prefix[-1].isspace():  # tokens of its own
        prefix, apart = "", [prefix, suffix]
    around = sum(len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in apart if part)
    ids = tokenizer([prefix + text for text in texts], truncation=False, padding=False, verbose=False)["input_ids"]
    return np.array([around + len(row) for row in ids], np.int64)


def about_tokens(texts: Sequence[str]) -> np.ndarray:
    """``(texts,)``: how many tokens texts have where no tokenizer counts them, a fourth of their characters."""
    return np.array([-(-len(text) // CHARACTERS) for text in texts], np.int64)


def side_prompt(side: Side, prompts: Mapping[str, str], default_prompt_name: str | None) -> str:
    """What a model puts before queries, documents, or texts of one sort; "" for nothing."""
    return prompt_of({"query": QUERY, "document": DOCUMENT, "text": ()}[side], prompts, default_prompt_name)


def batches(lengths: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """The rows of one batch after another, the longest first, each of at most ``tokens`` with its padding; a longer
    text is a batch of its own."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        count = max(1, tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + count]
        start += count


def hash_of(model: SentenceTransformer) -> str:
    """A name of a model's weights and of how they are used: its modules' settings, tokenizer and longest text."""
    return hash_modules(model, f"{model.max_seq_length} {model.truncate_dim}")


def hash_modules(model: BaseModel, about: str) -> str:
    """A name of a model's weights, of its modules' settings and tokenizer, and of what else is said about its use."""
    hashed = hashlib.sha256(about.encode())
    for module in model:
        hashed.update(f"{type(module).__qualname__} {_settings(module)}".encode())
    for name, tensor in model.state_dict().items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.flatten().contiguous().cpu().view(torch.uint8).numpy())
    return hashed.hexdigest()


def _settings(module: torch.nn.Module) -> str:
    get_settings = getattr(module, "get_config_dict", None)
    settings = dict(get_settings()) if callable(get_settings) else {}
    config = getattr(getattr(module, "model", None), "config", None)
    if isinstance(config, PretrainedConfig):
        # What it was loaded from, and by which version, changes nothing.
        settings["config"] = {key: value for key, value in config.to_dict().items() if key not in ORIGINS}
    tokenizer: Any = getattr(module, "tokenizer", None)
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if isinstance(tokenizer, Tokenizer):
        state = json.loads(tokenizer.to_str())
        del state["truncation"], state["padding"]  # of the last call
        settings["tokenizer"] = state
    return json.dumps(settings, sort_keys=True, default=str)
