"""What a model gives for a few texts, and under which settings: kept with it, and compared where it is loaded.

A host library that changes a default changes every vector, and says nothing. So a published model carries
``reference.json``: embeddings of a few texts under each of its prompts, the token ids of the first, whether its first
token hears the last, its dtype and attention implementation, and the versions of the libraries. Everything can be
compared on request; at each loading one short text is. Of a text of several vectors, or of one weight for each token
of the vocabulary, a digest is kept, which every component changes.

Saving a model again leaves the file behind, so it never describes weights that were trained on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import sentence_transformers
import tokenizers
import torch
import transformers
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base import BaseModel
from torch import Tensor
from torch.nn.functional import pad

# The first has what normalisers change (case, an accent, two spaces, a compatibility character), and is short.
TEXTS = ("Café  №1", "How do I parse command line arguments?", "日本語 🐈 word " * 200)
DIGEST = 256  # components of a digest of the vocabulary's weights
LONGEST = 1_000  # characters of the text that is compared at each loading
ROUNDING, HALF_ROUNDING = 1e-3, 5e-2  # of the largest component, over devices and kernels


def take_reference(model: BaseModel, texts: Sequence[str] = TEXTS) -> dict[str, Any]:
    """Embeddings of ``texts`` under each of the model's prompts (without one, if it has none), and what they depend
    on."""
    texts, prompts = list(texts), {name: prompt or "" for name, prompt in model.prompts.items()} or {"document": ""}
    whole = model.truncate_embeddings(None) if isinstance(model, SentenceTransformer) else nullcontext()
    with whole, whole_float32():
        embeddings = {name: encode(model, texts, name, prompt).tolist() for name, prompt in prompts.items()}
    return {
        "texts": texts,
        "prompts": prompts,
        **_settings(model, texts[0], prompts),
        "bidirectional": _hears_the_end(model, texts[0]),
        "embeddings": {
            name: [[round(component, 7) for component in vector] for vector in vectors]
            for name, vectors in embeddings.items()
        },
    }


def encode(model: BaseModel, texts: Sequence[str], name: str, prompt: str) -> Tensor:
    """``(texts, dim)``: the embeddings under a prompt of some name, or a digest of each."""
    how: dict[str, Any] = {"prompt": prompt, "show_progress_bar": False}
    if isinstance(model, MultiVectorEncoder):
        return torch.stack([digest(vectors) for vectors in model.encode(list(texts), task=_side(name), **how)])
    vectors = model.encode(list(texts), convert_to_tensor=True, **how)
    return torch.stack([digest(row.to_dense()) for row in vectors]) if isinstance(model, SparseEncoder) else vectors


def _side(name: str) -> str:
    """Whose lengths and tokens hold under a prompt: a query's or a document's."""
    return "document" if name.endswith("document") else "query"


def digest(embedding: Tensor) -> Tensor:
    """One vector in place of a text's ``(tokens, dim)`` or ``(vocabulary,)``, of the vectors' width or of ``DIGEST``:
    a sum whose signs and weights differ from row to row."""
    if embedding.ndim == 1:
        embedding = pad(embedding, (0, -len(embedding) % DIGEST)).view(-1, DIGEST)
    rows = torch.arange(len(embedding), device=embedding.device).cos().unsqueeze(1)  # (rows, 1)
    return (rows * embedding.float()).sum(dim=0) / max(len(embedding), 1) ** 0.5


@contextmanager
def whole_float32() -> Iterator[None]:
    """Without TF32, which torch.compile's training arguments switch on for the rest of a process: on GPUs it rounds
    float32 to ten bits within a product."""
    matmul = torch.backends.cuda.matmul
    name, whole = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, whole)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def warn_if_changed(model: BaseModel, stored: dict[str, Any], dtype_chosen: bool) -> None:
    """Compare the first text's tokens under all prompts, and its embedding under the shortest; warn, naming what
    differs.

    Args:
        model: the model that was loaded.
        stored: the content of its ``reference.json``.
        dtype_chosen: whether who loads the model chose its precision, so that another one is no surprise.

    Raises:
        ValueError: if the first text is too long to be embedded at each loading.
    """
    text, prompts = stored["texts"][0], stored["prompts"]
    if len(text) > LONGEST:
        raise ValueError(f"its first text has {len(text):,} characters, where a short one is to be compared")
    shortest = min(prompts, key=lambda name: len(prompts[name]))
    expected = torch.tensor(stored["embeddings"][shortest][0])
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        embedding = _first(model, _embed(model, text, prompts[shortest], shortest)).float().cpu()
        difference = float((embedding - expected).abs().max() / expected.abs().max())
        exact = {torch.float32, torch.float64}.issuperset((getattr(torch, stored["dtype"]), model.dtype))
        differs = not difference <= (ROUNDING if exact else HALF_ROUNDING)
        now = _settings(model, text, prompts)
        if differs:
            now["bidirectional"] = _hears_the_end(model, text)
    finally:
        for module, training in modes:
            module.training = training
    changed = differing_settings(stored, now)
    versions = changed.pop("versions", None)
    if dtype_chosen:
        changed.pop("dtype", None)
    if differs:
        changed["embedding"] = f"differs by {difference:.0%} of its largest component"
    if changed.keys() - {"attn_implementation"}:  # which may be another, as long as it gives the same
        changed |= {"versions": versions} if versions else {}
        details = "; ".join(f"{setting}: {change}" for setting, change in changed.items())
        warnings.warn(
            f"This model does not give the embeddings that it gave when it was published. {details}. Load it with the "
            "versions and settings of its reference.json, or tell its authors.",
            stacklevel=2,
        )


def differing_settings(stored: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What differs between two references, by name: ``EOS``, ``tokenizer``, ``prompt``, ``mask``, ``dtype``,
    ``attn_implementation``, ``versions``."""
    changed = {}
    before, after = stored["token_ids_without_prompt"], now["token_ids_without_prompt"]
    if before[:-1] == after:
        changed["EOS"] = f"the token {before[-1]} no longer ends a text"
    elif before != after:
        changed["tokenizer"] = f"{stored['texts'][0]!r} was {before}, and is {after}"
    else:
        for name in sorted(stored["token_ids"].keys() & now["token_ids"].keys()):
            if stored["token_ids"][name] != now["token_ids"][name]:
                changed["prompt"] = f"{name!r} gives other tokens around a text"
    modes = {True: "bidirectional", False: "causal"}
    if stored["bidirectional"] != now.get("bidirectional", stored["bidirectional"]):
        changed["mask"] = f"{modes[stored['bidirectional']]} then, {modes[now['bidirectional']]} now"
    for setting in ("dtype", "attn_implementation"):
        if stored[setting] != now[setting]:
            changed[setting] = f"{stored[setting]} then, {now[setting]} now"
    if other := [k for k in stored["versions"] if stored["versions"][k] != now["versions"].get(k)]:
        then = ", ".join(f"{name} {stored['versions'][name]}" for name in other)
        changed["versions"] = f"{then} then, {', '.join(str(now['versions'].get(name)) for name in other)} now"
    return changed


def _settings(model: BaseModel, text: str, prompts: dict[str, str]) -> dict[str, Any]:
    def token_ids(prompt: str) -> list[int]:
        return model.preprocess([text], prompt=prompt or None)["input_ids"][0].tolist()

    return {
        "token_ids": {name: token_ids(prompt) for name, prompt in prompts.items()},
        "token_ids_without_prompt": token_ids(""),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model[0].model.config._attn_implementation,
        "versions": {
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
            "transformers": transformers.__version__,
            "sentence-transformers": sentence_transformers.__version__,
        },
    }


@torch.no_grad()
def _embed(model: BaseModel, text: str, prompt: str = "", name: str = "", other_token: bool = False) -> dict[str, Any]:
    """The model's outputs for one text under a prompt of some name; with another token in the place next to its
    last."""
    side = {"task": _side(name)} if isinstance(model, MultiVectorEncoder) else {}
    features = model.preprocess([text], prompt=prompt or None, **side)
    features = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in features.items()}
    if other_token:
        features["input_ids"][0, -2] = features["input_ids"][0, -3]
    return model(features, **side)


def _first(model: BaseModel, outputs: dict[str, Any]) -> Tensor:
    """The embedding of the first text, or its digest."""
    if isinstance(model, MultiVectorEncoder):
        return digest(outputs["token_embeddings"][0][outputs["attention_mask"][0].bool()])
    vector = outputs["sentence_embedding"][0]
    return digest(vector) if isinstance(model, SparseEncoder) else vector


def _hears_the_end(model: BaseModel, text: str) -> bool:
    """Does the first token move with a later one?"""
    first, other = (
        _embed(model, text, other_token=other)["token_embeddings"][0, 0].float() for other in (False, True)
    )
    return bool((first - other).abs().max() > 1e-5 * first.abs().max())
