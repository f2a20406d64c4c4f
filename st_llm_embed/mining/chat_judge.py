"""An LLM on an OpenAI-compatible server as the judge: asked whether a document is relevant, how probable is "yes"?

By ``/chat/completions`` with the log-probabilities of the first token, as vLLM, SGLang, llama.cpp and OpenAI give
them: P(yes) / (P(yes) + P(no)), over all spellings of the two words. One token is made for each pair.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import exp

import numpy as np

from st_llm_embed.encoding.json_server import JsonServer
from st_llm_embed.mining.judge import PROBABILITIES, nobody

REQUESTS = 8  # at once
CHARACTERS = 8_000  # of a document: some 2,000 tokens, in which an LLM sees what it is about
LISTED = 20  # tokens whose probabilities are asked for, the most that OpenAI and vLLM give
LEAST = 0.1  # probability of yes and no together, below which it answers something else
QUESTION = """Is the document relevant to the query? It is if it answers the query, or is what the query looks for.
{instruction}
Query: {query}

Document: {document}

Answer with one word: yes or no."""


class ChatJudge:
    """The probability of "yes". The server's key, if it wants one, is in the environment: ``OPENAI_API_KEY``.

    Args:
        url: the address that ``/chat/completions`` follows, such as ``http://localhost:8000/v1``.
        model: the name of the model on the server. Default: the one that it has.
        instruction: the task whose queries these are, in a sentence for the LLM.

    Raises:
        ValueError: for an address of another kind, and for a server of several models without a name.
        OSError: for a server that does not answer.
    """

    scale = PROBABILITIES

    def __init__(self, url: str, model: str | None = None, instruction: str | None = None) -> None:
        self.server = JsonServer(url)
        if model is None:
            names = self.server.models()
            if len(names) != 1:
                raise ValueError(
                    f"{url} has {len(names)} models{': ' if names else ''}{', '.join(names)}. Say which is the judge: "
                    f"{url}#{names[0] if names else 'NAME'}."
                )
            model = names[0]
        self.model = model
        self.name = f"{self.server.url}#{model}"
        self.instruction = f"The task: {instruction}\n" if instruction else ""
        # Of the same name, another server may have another model.
        asked = json.dumps([self.name, QUESTION, self.instruction, CHARACTERS])
        self.identity = hashlib.sha256(asked.encode()).hexdigest()[:16]

    def score(
        self, queries: Sequence[str], documents: Sequence[str], done: Callable[[int], None] = nobody
    ) -> np.ndarray:
        """``(pairs,)``: see ``Judge``.

        Raises:
            AnsweredError: if the server refuses.
            OSError: if it does not answer.
            ValueError: if it gives no log-probabilities, or those of other words than yes and no.
        """
        scores = []
        with ThreadPoolExecutor(REQUESTS) as requests:
            for score in requests.map(self._score, queries, documents):
                scores.append(score)
                done(1)
        return np.array(scores, np.float32)

    def _score(self, query: str, document: str) -> float:
        question = QUESTION.format(instruction=self.instruction, query=query, document=document[:CHARACTERS])
        body = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": LISTED}
        asked = {"model": self.model, "messages": [{"role": "user", "content": question}], **body}
        answer = self.server.ask("/chat/completions", asked)
        try:
            first = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            listed = [(str(token["token"]), exp(token["logprob"])) for token in first]
        except (KeyError, IndexError, TypeError, OverflowError) as error:
            raise ValueError(
                f"{self.name} answers without the log-probabilities of its first token: {str(answer)[:200]}. The "
                "judge needs them; see whether the server gives logprobs and top_logprobs."
            ) from error
        yes, no = (sum(p for token, p in listed if token.strip().casefold() == word) for word in ("yes", "no"))
        if not yes + no >= LEAST:
            words = ", ".join(repr(token) for token, _ in listed[:5])
            raise ValueError(
                f"{self.name} answers neither yes nor no: its first token is one of {words}. Serve a model that "
                "answers at once, without thinking first."
            )
        return yes / (yes + no)
