"""A model that a server has, such as vLLM or TEI: vectors by OpenAI's ``/embeddings`` or TEI's ``/embed``.

Such a server puts no prompt before a text, and may refuse a long one, so both are done here: the prompt put before it,
and the text cut to what the model takes. Before the first text of a corpus, the server is asked for the texts of the
published model's ``reference.json``, and refused if it answers other vectors: a wrong pooling, mask or end token shows
there, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from st_llm_embed.encoding.encoder import SIDES, Side, about_tokens, side_prompt
from st_llm_embed.encoding.json_server import JsonServer
from st_llm_embed.files import read_json
from st_llm_embed.tasks import TEXT
from st_llm_embed.trust import fetch

Route = Literal["/embeddings", "/embed"]
AT_ONCE = 32  # texts of a request: TEI refuses more
REQUESTS = 8  # at once
LEAST_COSINE = 0.99  # with reference.json, as servers compute in half precision


class EmbeddingServer(JsonServer):
    """Vectors of texts as they are, by HTTP. Its key, if it wants one, is in the environment: ``OPENAI_API_KEY``.

    Args:
        url: the address that the route follows, such as ``http://localhost:8000/v1``.
        name: the name of the model on the server.
        route: ``/embeddings``, which is OpenAI's, or ``/embed``, which is TEI's and takes no name.

    Raises:
        ValueError: for an address of another kind.
    """

    def __init__(self, url: str, name: str, route: Route = "/embeddings") -> None:
        super().__init__(url)
        self.name, self.route = name, route

    def embed(self, texts: Sequence[str], done: Callable[[int], None] = lambda count: None) -> np.ndarray:
        """``(texts, dim)`` in float32. ``done`` hears of every request how many texts it had.

        Raises:
            AnsweredError: if the server refuses.
            OSError: if it does not answer.
            ValueError: if it answers something else than a finite vector for each text, all of one width.
        """
        parts = [list(texts[start : start + AT_ONCE]) for start in range(0, len(texts), AT_ONCE)]
        vectors: list[np.ndarray] = []
        with ThreadPoolExecutor(REQUESTS) as requests:
            for part in requests.map(self._vectors, parts):
                vectors.append(part)
                done(len(part))
        if len(widths := {part.shape[1] for part in vectors}) > 1:
            raise ValueError(f"{self.url} answered vectors of {' and of '.join(map(str, sorted(widths)))} numbers.")
        return np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32)

    def _vectors(self, texts: list[str]) -> np.ndarray:
        """``(texts, dim)``: the vectors of some texts, in one request."""
        openai = {"model": self.name, "input": texts, "encoding_format": "float"}
        answer = self.ask(self.route, {"inputs": texts} if self.route == "/embed" else openai)
        try:
            if self.route == "/embed":  # in the order of the texts
                rows = [{"index": number, "embedding": vector} for number, vector in enumerate(answer)]
            else:
                rows = sorted(answer["data"], key=lambda row: row["index"])
            numbers = [row["index"] for row in rows]
            vectors = np.array([row["embedding"] for row in rows], np.float32)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.url} answered something else than embeddings: {error!r}.") from error
        if numbers != list(range(len(texts))):
            raise ValueError(
                f"{self.url} answered {len(rows)} vectors for {len(texts)} texts, numbered {numbers[:40]}."
            )
        if vectors.ndim != 2 or not vectors.shape[1]:
            raise ValueError(
                f"{self.url} answered vectors of the shape {vectors.shape}, which is not (texts, numbers)."
            )
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{self.url} answered NaN, infinity or null for {texts[int(finite.argmin())][:80]!r}. Start the "
                "server with another precision, such as float32 or bfloat16."
            )
        return vectors


class ServerEncoder:
    """The vectors that a server gives. Its key, if it wants one, is in the environment: ``OPENAI_API_KEY``.

    Args:
        url: the address that ``/embeddings`` follows, such as ``http://localhost:8000/v1``.
        model: the folder or Hub id of the published model that it has; its weights are not read.
        served_name: the name of the model on the server. Default: ``model``.
        side: whether the texts are queries, documents, or of one sort, which says the prompt.
        prompt_name: the name of another of the model's prompts.

    Raises:
        ValueError: for a model without ``reference.json``, an unknown prompt, and a server that answers other vectors.
        OSError: for a server that does not answer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        served_name: str | None = None,
        side: Side = "document",
        prompt_name: str | None = None,
    ) -> None:
        if side not in SIDES:
            raise ValueError(f"side={side!r} is unknown. Valid values: {', '.join(SIDES)}.")
        self.server = EmbeddingServer(url, served_name or model)
        root = fetch(model)
        if not (root / "reference.json").is_file():
            raise ValueError(
                f"{model} has no reference.json, by which a server's vectors are compared with its own. Publish it "
                "with st-llm-embed seal, or encode without --url."
            )
        reference = read_json(root / "reference.json")
        config = read_json(root / "config_sentence_transformers.json")
        prompts = config.get("prompts", {})
        if prompt_name is None:
            self.prompt = side_prompt(side, prompts, config.get("default_prompt_name"))
        elif prompt_name in prompts:
            self.prompt = prompts[prompt_name]
        else:
            raise ValueError(f"prompt_name={prompt_name!r} is unknown. The model has: {', '.join(prompts)}.")
        self.tokenizer = published_tokenizer(root)
        self.longest = longest_of(self.tokenizer)
        self.description = {"model": model, "side": side, "prompt": self.prompt, "dtype": "of a server"}
        hashed = f"{json.dumps(reference, sort_keys=True)} server {self.prompt!r}"
        self.identity = hashlib.sha256(hashed.encode()).hexdigest()[:16]
        self._check(reference)

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray:
        if self.tokenizer is None:
            return about_tokens(texts)
        ids = self.tokenizer([self._prompted(text) for text in texts], truncation=False, verbose=False)["input_ids"]
        return np.array([len(row) for row in ids], np.int64)

    def encode(self, texts: Sequence[str], done: Callable[[int], None] = lambda count: None) -> np.ndarray:
        return self.server.embed([self._prompted(self._cut(text)) for text in texts], done)

    def _prompted(self, text: str) -> str:
        return with_prompt(text, self.prompt)

    def _cut(self, text: str) -> str:
        return cut_text(text, self.prompt, self.tokenizer)

    def _check(self, reference: dict[str, Any]) -> None:
        """The server's vectors are those of the published model."""
        name = next((name for name, prompt in reference["prompts"].items() if prompt == self.prompt), None)
        if name is None:
            raise ValueError(
                f"reference.json has no vectors under the prompt {self.prompt!r}, so that those of a server cannot be "
                f"compared. It has them under: {', '.join(map(repr, reference['prompts'].values()))}."
            )
        expected = np.array(reference["embeddings"][name], np.float32)
        found = self.encode(reference["texts"])
        if found.shape != expected.shape:
            raise ValueError(
                f"{self.server.url} gives vectors of {found.shape[1]} numbers, and the published model has "
                f"{expected.shape[1]}."
            )
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        cosines = (found * expected).sum(axis=1) / norms.clip(min=np.finfo(np.float32).tiny)
        worst = int(cosines.argmin())
        if not cosines[worst] >= LEAST_COSINE:
            raise ValueError(
                f"{self.server.url} gives other vectors than the published model: for "
                f"{reference['texts'][worst][:40]!r} under the prompt {name!r} the cosine is {cosines[worst]:.3f}. "
                "Its pooling, attention mask, end token or longest text is another (st-llm-embed check --url names "
                "it). Nothing was encoded."
            )


def published_tokenizer(root: Path) -> PreTrainedTokenizerBase | None:
    """The published model's, wherever in its folder it is."""
    for file in sorted(root.rglob("tokenizer.json")):
        return AutoTokenizer.from_pretrained(str(file.parent))
    return None


def longest_of(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The number of tokens after which a text is cut, if it is."""
    longest = getattr(tokenizer, "model_max_length", None)
    return longest if longest and longest < 1 << 30 else None


def with_prompt(text: str, prompt: str) -> str:
    """A text as a client sends it: after the prompt, or where it has its place in it."""
    return prompt.replace(TEXT, text) if TEXT in prompt else prompt + text


def cut_text(text: str, prompt: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """What the model takes of a text under the prompt."""
    before, longest = prompt.partition(TEXT)[0], longest_of(tokenizer)
    if tokenizer is None or longest is None:
        return text
    # A token is a byte at least: what is short in bytes is not counted. 4: special tokens.
    while len(with_prompt(text, prompt).encode()) + 4 > longest:
        tokens = tokenizer(with_prompt(text, prompt), truncation=False, verbose=False, return_offsets_mapping=True)
        excess = len(tokens["input_ids"]) - longest
        inside = [
            (max(start - len(before), 0), end - len(before))
            for start, end in tokens["offset_mapping"]
            if end > max(start, len(before)) and start < len(before) + len(text)
        ]
        if excess <= 0 or not inside:
            break
        # Once more, as what is left may be other tokens: of a word that was cut, a character that was several.
        if tokenizer.truncation_side == "left":
            text = text[inside[:excess][-1][1] :]
        else:
            text = text[: inside[-excess:][0][0]]
    return text
