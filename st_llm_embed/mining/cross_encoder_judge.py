"""A cross-encoder as the judge: it reads query and document together, and gives them a logit or a probability."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import CrossEncoder

from st_llm_embed.encoding.encoder import batches, count_tokens, hash_modules, tokens_for
from st_llm_embed.mining.judge import LOGITS, PROBABILITIES, nobody
from st_llm_embed.trust import check_base, check_no_code, loading

SCALES = {torch.nn.Sigmoid: PROBABILITIES, torch.nn.Identity: LOGITS}  # by what comes after the logits


class CrossEncoderJudge:
    """The scores that ``predict`` gives, under the model's own prompt and activation.

    Args:
        model: the cross-encoder; its weights are hashed here.
        tokens_per_batch: the number of tokens of the pairs read at once, padding included. Default: 2,048 on a CPU,
            32,768 elsewhere.

    Raises:
        ValueError: for one with several labels, and with an activation of which it is not known what it gives.
    """

    name = "CrossEncoder"

    def __init__(self, model: CrossEncoder, tokens_per_batch: int | None = None) -> None:
        if model.num_labels != 1:
            raise ValueError(
                f"The judge {self.name} has num_labels={model.num_labels}. A judge gives one score to a pair: "
                "num_labels=1."
            )
        activation = type(model.activation_fn)
        if activation not in SCALES:
            raise ValueError(
                f"The judge {self.name} has the activation {activation.__name__}. Expected: Sigmoid, which gives "
                f"{PROBABILITIES}, or Identity, which gives {LOGITS}. Fix: CrossEncoder(..., "
                "activation_fn=torch.nn.Sigmoid())."
            )
        self.scale = SCALES[activation]
        self.model = model
        self.tokens_per_batch = tokens_per_batch or tokens_for(model)
        prompts = json.dumps([model.prompts, model.default_prompt_name], sort_keys=True)
        self.identity = hash_modules(model, f"{model.max_seq_length} {activation.__name__} {prompts}")[:16]

    def score(
        self, queries: Sequence[str], documents: Sequence[str], done: Callable[[int], None] = nobody
    ) -> np.ndarray:
        """``(pairs,)``: see ``Judge``."""
        lengths = count_tokens(self.model, queries) + count_tokens(self.model, documents)
        if self.model.max_seq_length is not None:
            lengths = lengths.clip(max=self.model.max_seq_length)
        scores = np.empty(len(queries), np.float32)
        for rows in batches(lengths, self.tokens_per_batch):
            pairs = [(queries[row], documents[row]) for row in rows]
            scores[rows] = self.model.predict(pairs, batch_size=len(pairs), show_progress_bar=False)
            done(len(pairs))
        return scores


def load_cross_encoder(root: Path, trust_remote_code: bool) -> CrossEncoder:
    """The cross-encoder in a folder, whose own code runs only if told to.

    Raises:
        ValueError: for code without consent, and for a folder that cannot be loaded.
    """
    unknown = check_no_code(root, trust_remote_code)
    check_base(root, trust_remote_code)
    with loading(root):
        return CrossEncoder(str(root), trust_remote_code=unknown)
