"""Name what differs between a model's vectors and those that others gave for the same texts.

Each usual fault is computed with the model itself (another prompt or none, no EOS, the other mask, another pooling, up
to three at once), and the one whose vectors point where the found ones do is named: the one with the fewest faults, if
several do. The rest shows in the numbers: normalisation in their length, dimensions in their count, precision in a
small angle, truncation in the long texts alone.

Vectors are ``(texts, dim)`` in float32; a distance is that of two vectors brought to length 1, ``sqrt(2 - 2 cosine)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_llm_embed.encoding.server import cut_text, with_prompt
from st_llm_embed.modules.attention_mask import attending
from st_llm_embed.modules.reference import LONGEST
from st_llm_embed.modules.special_tokens import special_ids
from st_llm_embed.tasks import TEXT

EXACT = 1e-3  # the largest distance that kernels and devices make in float32
NEAR = 0.14  # that of a cosine of 0.99: more is not rounding
UNIT = 1e-2  # how far from 1 a vector's length may be, in half precision too
MOST_TEXTS, MOST_FAULTS = 4, 3  # that are computed; at once

Faults = dict[str, str]  # what differs, such as EOS, to how
Hypothesis = tuple[Faults, np.ndarray]  # what its vectors would be


class Named(NamedTuple):
    """What differs under one prompt.

    Args:
        faults: what differs, by ``prompt``, ``BOS``, ``EOS``, ``mask``, ``pooling``, ``normalisation``,
            ``dimensions``, ``truncation``, ``precision``, and how; ``unknown`` where no fault gives these vectors.
        cosine: the least cosine with the model's vectors, of the dimensions that there are and, where nothing else
            differs, without texts that were cut between characters, where the model cuts between tokens.
    """

    faults: Faults
    cosine: float


def name_differences(
    reference: Mapping[str, Any],
    found: Mapping[str, np.ndarray],
    load: Callable[..., SentenceTransformer],
) -> dict[str, Named]:
    """What differs, by prompt.

    Args:
        reference: the content of the model's ``reference.json``.
        found: ``(texts, dim)`` by the name of the prompt: the vectors of its texts, no wider than the model's.
        load: loads the model, with keyword arguments of ``SentenceTransformer``. It is called only where the reference
            alone does not explain the vectors; where that fails, faults are named by the numbers alone.
    """
    texts = reference["texts"]
    short = [row for row, text in enumerate(texts) if len(text) <= LONGEST][:MOST_TEXTS]
    short = short or [min(range(len(texts)), key=lambda row: len(texts[row]))]
    long = sorted({*range(len(texts))} - {*short})
    computed = _Computed(load, reference)
    named = {}
    for name, vectors in found.items():
        expected = np.array(reference["embeddings"][name], np.float32)
        others = [
            ({"prompt": f"that of {other!r}"}, np.array(rows, np.float32)[short])
            for other, rows in reference["embeddings"].items()
            if other != name
        ]
        apart = _distance(vectors[short], expected[short])
        most = 1 if apart <= NEAR else MOST_FAULTS
        hypotheses = chain([({}, expected[short])], others, computed.faults(name, short, most))
        faults, distance = _fit(vectors[short], hypotheses)
        uncut: list[int] = []
        if distance > NEAR or (faults and distance > apart / 2):
            nearest = "" if distance > NEAR else f"; the nearest is {_listed(faults)}"
            faults = {"unknown": f"no usual fault gives these vectors{nearest}{computed.reason}"}
        elif not faults:
            distances = {row: _distance(vectors[[row]], expected[[row]]) for row in long}
            uncut = [row for row in long if distances[row] <= max(EXACT, 3 * distance)]
            for row in {*long} - {*uncut}:
                faults = faults | computed.truncation(name, row, vectors[[row]])
        if vectors.shape[1] < expected.shape[1]:
            faults = faults | {"dimensions": f"the first {vectors.shape[1]} of {expected.shape[1]} numbers"}
        faults = faults | _lengths(vectors[short], expected[short], faults)
        if distance > EXACT and "unknown" not in faults:
            faults = faults | {"precision": computed.precision(name, short, distance)}
        counted = [*range(len(texts))] if faults.keys() - {"precision"} else [*short, *uncut]
        named[name] = Named(faults, 1 - _distance(vectors[counted], expected[counted]) ** 2 / 2)
    return named


def _fit(found: np.ndarray, hypotheses: Iterable[Hypothesis]) -> tuple[Faults, float]:
    """The first of the hypotheses that come near the nearest one. What is exact needs no further ones."""
    tried = []
    for faults, vectors in hypotheses:
        if vectors.shape[1] >= found.shape[1]:
            tried.append((faults, _distance(found, vectors)))
            if tried[-1][1] <= EXACT:
                break
    nearest = min(distance for _, distance in tried)
    return next((faults, distance) for faults, distance in tried if distance <= max(2 * nearest, EXACT))


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest of any row, of the dimensions that both have."""
    tiny = np.finfo(np.float32).tiny
    one, other = (
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=tiny)
        for vectors in (found, expected[:, : found.shape[1]])
    )
    return float(np.linalg.norm(one - other, axis=1).max())


def _lengths(found: np.ndarray, expected: np.ndarray, faults: Faults) -> Faults:
    lengths, theirs = (np.linalg.norm(vectors, axis=1) for vectors in (expected, found))
    unit, are_unit = (bool((abs(ones - 1) <= UNIT).all()) for ones in (lengths, theirs))
    if unit and not are_unit:
        return {"normalisation": "the vectors are not of length 1"}
    if are_unit and not unit:
        return {"normalisation": "the vectors are of length 1, and the model's are not"}
    if not (unit or faults or np.allclose(lengths, theirs, rtol=UNIT)):
        return {"normalisation": "the vectors are longer or shorter than the model's"}
    return {}


def _listed(faults: Faults) -> str:
    return "; ".join(f"{fault}: {how}" for fault, how in faults.items())


class _Computed:
    """What the model gives under each fault. It is loaded when it is first asked for."""

    def __init__(self, load: Callable[..., SentenceTransformer], reference: Mapping[str, Any]) -> None:
        self.load, self.reference = load, reference
        self.loaded: SentenceTransformer | None = None
        self.reason = ""  # why there is no model, for a message

    def model(self) -> SentenceTransformer | None:
        if self.loaded is None and not self.reason:
            try:
                self.loaded = self.load().eval()
            except (ValueError, OSError, ImportError, RuntimeError) as error:
                self.reason = f". Only the numbers were looked at, as the model was not loaded: {error}"
        return self.loaded

    def faults(self, name: str, rows: Sequence[int], most: int) -> Iterator[Hypothesis]:
        """Single faults first, then several at once, but no more than ``most``."""
        if (model := self.model()) is None:
            return
        texts, causal = [self.reference["texts"][row] for row in rows], not self.reference["bidirectional"]
        before, after = _around(model)
        axes = (_prompts(name, self.reference["prompts"]), _begins(model, before), _ends(model, after))
        modes = [({}, causal), ({"mask": "bidirectional" if causal else "causal"}, not causal)]
        states: dict[Any, list[dict[str, Any]]] = {}
        ways = sorted(product(*axes, modes, POOLINGS), key=lambda way: sum(len(option[0]) for option in way))
        for way in ways:
            faults = {fault: how for option in way for fault, how in option[0].items()}
            if len(faults) > most:
                return
            (_, (place, prompt)), (_, first), (_, last), (_, mode), (_, pooling) = way
            key = (place, prompt, tuple(first), tuple(last), mode)
            if key not in states:
                placed = [with_prompt(text, place) for text in texts]
                states[key] = [_states(model, text, prompt, first, last, mode) for text in placed]
            vectors = np.concatenate([_pooled(model, dict(features), pooling) for features in states[key]])
            if not faults and _distance(vectors, self._expected(name, rows)) > NEAR:
                self.reason = ". The model does not give them here either: check it without --url and --vectors first"
            yield faults, vectors

    def _expected(self, name: str, rows: Sequence[int]) -> np.ndarray:
        return np.array(self.reference["embeddings"][name], np.float32)[list(rows)]

    def truncation(self, name: str, row: int, found: np.ndarray) -> Faults:
        """How a long text was cut, if not as by the model."""
        text, prompt = self.reference["texts"][row], self.reference["prompts"][name]
        if (model := self.model()) is None:
            near = _distance(found, self._expected(name, [row])) <= NEAR
            how = f"a text of {len(text):,} characters differs, and short ones do not{self.reason}"
            return {} if near else {"truncation": how}
        longest, positions = model.max_seq_length, getattr(model[0].model.config, "max_position_embeddings", 1 << 20)
        joined = with_prompt(text, prompt)
        whole = len(model.tokenizer(joined, truncation=False, verbose=False)["input_ids"])
        before, after = _around(model)

        def hypotheses() -> Iterator[Hypothesis]:
            yield {}, _encode(model, [cut_text(text, prompt, model.tokenizer)], prompt)
            for length in sorted({min(whole, positions), *(1 << power for power in range(5, 15))} - {longest}):
                if length <= min(whole, positions):
                    model.max_seq_length = length
                    how = "embedded whole" if length == whole else f"cut after {length:,}"
                    yield {"truncation": f"a text of {whole:,} tokens is {how}{limit}"}, _encode(model, [text], prompt)
            model.max_seq_length = longest
            if TEXT in prompt:
                how = "is cut with the prompt around it, which loses its part after the text"
                yield {"truncation": f"a text of {whole:,} tokens {how}"}, _encode(model, [joined], "")
            if after and longest is not None:
                model.max_seq_length = longest + len(after)
                features = _states(model, text, prompt, before, [], not self.reference["bidirectional"])
                yield {"truncation": "a text that is cut loses its EOS token"}, _pooled(model, features, "own")

        limit = f", and by the model after {longest:,}" if longest is not None and longest < whole else ""
        try:
            faults, distance = _fit(found, hypotheses())
        finally:
            model.max_seq_length = longest
        return faults if distance <= NEAR else {"truncation": f"a text of {whole:,} tokens is cut in another way"}

    def precision(self, name: str, rows: Sequence[int], distance: float) -> str:
        """How large a distance is beside those of half precision."""
        if self.model() is None:
            return "rounded"
        texts, prompt = [self.reference["texts"][row] for row in rows], self.reference["prompts"][name]
        for dtype in ("float16", "bfloat16"):
            vectors = _encode(self.load(model_kwargs={"dtype": getattr(torch, dtype)}), texts, prompt)
            if distance <= 3 * _distance(vectors, self._expected(name, rows)):
                return f"rounded as by {dtype}"
        return "rounded more than by bfloat16, as quantised weights do"


def _prompts(name: str, prompts: Mapping[str, str]) -> list[tuple[Faults, tuple[str, str]]]:
    """Where a text goes before the model gets it, and the prompt that the model puts around that."""
    prompt = prompts[name]
    joined = prompt if TEXT in prompt else prompt + TEXT
    options: list[tuple[Faults, tuple[str, str]]] = [({}, (TEXT, prompt))]
    if prompt:
        options.append(({"prompt": "there is none"}, (TEXT, "")))
        options.append(({"prompt": "it is tokenized as a part of the text"}, (joined, "")))
        options.append(({"prompt": "it is there twice"}, (joined, prompt)))
    if "\n" in prompt:
        options.append(({"prompt": "its line breaks became spaces"}, (joined.replace("\n", " "), "")))
    for other, theirs in prompts.items():
        if theirs not in ("", prompt):
            options.append(({"prompt": f"that of {other!r}"}, (TEXT, theirs)))
            if prompt:
                options.append(({"prompt": f"that of {other!r} is there, too, before it"}, (joined, theirs)))
    return options


def _begins(model: SentenceTransformer, before: list[int]) -> list[tuple[Faults, list[int]]]:
    options: list[tuple[Faults, list[int]]] = [({}, before)]
    if before:
        return [*options, ({"BOS": "no BOS token begins a text"}, []), ({"BOS": "it is there twice"}, before * 2)]
    bos = model.tokenizer.bos_token_id
    return options if bos is None else [*options, ({"BOS": "a BOS token begins a text"}, [bos])]


def _ends(model: SentenceTransformer, after: list[int]) -> list[tuple[Faults, list[int]]]:
    options: list[tuple[Faults, list[int]]] = [({}, after)]
    if after:
        return [*options, ({"EOS": "no EOS token ends a text"}, []), ({"EOS": "it is there twice"}, after * 2)]
    eos = model.tokenizer.eos_token_id
    return options if eos is None else [*options, ({"EOS": "an EOS token ends a text"}, [eos])]


POOLINGS: list[tuple[Faults, str]] = [
    ({}, "own"),
    ({"pooling": "the prompt's tokens are in the pool"}, "with prompt"),
    ({"pooling": "the mean of all tokens"}, "mean"),
    ({"pooling": "the last token's state"}, "last"),
    ({"pooling": "the first token's state"}, "first"),
]


def _around(model: SentenceTransformer) -> tuple[list[int], list[int]]:
    """The ids of BOS and EOS around a text, also where the backbone writes EOS into the text."""
    before, after = special_ids(model.tokenizer)
    ids, eos = model.preprocess(["a"])["input_ids"][0].tolist(), model.tokenizer.eos_token_id
    return before, after or ([eos] if ids[-1] == eos else [])


@contextmanager
def _mode(model: SentenceTransformer, causal: bool) -> Iterator[None]:
    """The LLM's attention for as long."""
    backbone, llm = model[0], model[0].model
    was = getattr(llm.config, "is_causal", True), getattr(backbone, "attention", None)
    if not causal:
        with attending(llm, "bidirectional"):
            yield
        return
    llm.config.is_causal = True
    if was[1] is not None:
        backbone.attention = "causal"
    try:
        yield
    finally:
        llm.config.is_causal = was[0]
        if was[1] is not None:
            backbone.attention = was[1]


@torch.no_grad()
def _states(
    model: SentenceTransformer, text: str, prompt: str, first: list[int], last: list[int], causal: bool
) -> dict[str, Any]:
    """The features of one text with its ``token_embeddings`` ``(1, seq, dim)``, between other special tokens."""
    features = model.preprocess([text], prompt=prompt or None)
    before, after = _around(model)
    end = features["input_ids"].shape[1] - len(after)
    inside = slice(len(before), end)
    ids = [*first, *features["input_ids"][0, inside].tolist(), *last] or [model.tokenizer.eos_token_id]
    features["input_ids"] = torch.tensor([ids])
    if (mask := features.get("instruction_mask")) is not None:
        kept = [*[1] * len(first), *mask[0, inside].tolist(), *[0] * len(last)] or [0]
        features["instruction_mask"] = torch.tensor([kept]) * int(mask.any())
    features["attention_mask"] = torch.ones_like(features["input_ids"])
    features = {key: one.to(model.device) if isinstance(one, Tensor) else one for key, one in features.items()}
    with _mode(model, causal):
        return model[0](features)


@torch.no_grad()
def _pooled(model: SentenceTransformer, features: dict[str, Any], pooling: str) -> np.ndarray:
    """``(1, dim)``: the vector, with the model's own pooling or another before the modules that follow it."""
    rest = list(model)[1:]
    if pooling == "with prompt":
        features.pop("instruction_mask", None)
        features.pop("prompt_length", None)
    elif pooling != "own":
        states = features["token_embeddings"]
        one = {"mean": states.mean(dim=1), "last": states[:, -1], "first": states[:, 0]}[pooling]
        features["sentence_embedding"], rest = one, rest[1:]
    for module in rest:
        features = module(features)
    return features["sentence_embedding"].float().cpu().numpy()


def _encode(model: SentenceTransformer, texts: list[str], prompt: str) -> np.ndarray:
    return model.encode(texts, prompt=prompt, show_progress_bar=False, convert_to_tensor=True).float().cpu().numpy()
