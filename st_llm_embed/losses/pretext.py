"""LLaRA's two pretext tasks on raw text, in one pass (arXiv 2312.15503, section 3).

    EBAE   the embedding of "{text} The original sentence:" predicts the words of the text itself
    EBAR   the embedding of "{text} The next sentence:"     predicts the words of the text that follows

Both are a bag-of-words cross-entropy through the LLM's own vocabulary projection W: -log softmax(W e) over the
target's set of tokens. One pass serves both, see ``joint_prompts.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from sentence_transformers.base import BaseModel
from torch import Tensor, nn

from st_llm_embed.losses.chunked_cross_entropy import ChunkedCrossEntropy
from st_llm_embed.losses.joint_prompts import JointPrompts, check_llm, join_prompts
from st_llm_embed.losses.lm_head import LastStates, backbone_of, vocabulary_projection
from st_llm_embed.losses.pretext_prompts import read_prompts
from st_llm_embed.recipes import EBAE_PROMPT, EBAR_PROMPT

FORMS = ("mean", "paper", "release")


class PretextLoss(nn.Module):
    """EBAE + EBAR over the columns ``text``, ``next`` and perhaps ``target``.

    Works on any model whose first module is an ``LLMBackbone``, in the backbone's own attention mode.

    Args:
        model: the model to adapt. Its pooling takes no part.
        self_prompt: EBAE's prompt, with ``{text}``. What it has before the text, the column ``text`` must have got as
            its prompt (``prompts={"text": '"{text}'}`` of the training arguments for the released code's quote;
            ``LLMEmbedTrainer`` sees to it).
        next_prompt: EBAR's prompt, with the same before the text.
        num_tokens: how many last tokens of each prompt carry the embedding. Where several do, the vocabulary logits
            are their element-wise maximum, as in the released code.
        lm_head: the vocabulary projection, a Linear from the hidden width to the vocabulary. Default: the LLM's input
            embeddings, where its config ties them to the LM head; added tokens that LoRA trains are in them.
        form: ``"mean"`` averages over the tokens of a bag, so that parts read as nats per word; ``"paper"`` sums over
            them; ``"release"`` does what the released code does: the average, divided by 10, halved where both terms
            have targets, beside an autoregressive loss on the text (``ar``).

    Inputs:
        +---------------------+--------+
        | Columns             | Labels |
        +=====================+========+
        | text, next          | none   |
        +---------------------+--------+
        | text, next, target  | none   |
        +---------------------+--------+

        EBAE predicts ``target``, or ``text`` where there is none; EBAR predicts ``next``. A row counts in the terms
        whose target has a token that is not special: with an empty ``next``, in EBAE only.

    Returns:
        ``{"ebae": ..., "ebar": ...}`` and perhaps ``"ar"``, which the trainer adds up and logs by name.

    Raises:
        ValueError: if the model has no LLMBackbone, no tied LM head and none is given, the prompts lack ``{text}`` or
            differ before it, the form is unknown, or an autoregressive loss is asked of a bidirectional model; and for
            an LLM that counts positions by itself, or passes information between tokens other than by attention under
            a mask: it cannot have both prompts in one row.
    """

    def __init__(
        self,
        model: BaseModel,
        self_prompt: str = EBAE_PROMPT,
        next_prompt: str = EBAR_PROMPT,
        num_tokens: int = 1,
        lm_head: nn.Linear | None = None,
        form: Literal["mean", "paper", "release"] = "mean",
    ) -> None:
        super().__init__()
        backbone = backbone_of(model, lm_head, "PretextLoss")
        if form not in FORMS:
            raise ValueError(f"form={form!r} is unknown. Valid forms: {', '.join(FORMS)}.")
        if form == "release" and backbone.attention != "causal":
            raise ValueError("form='release' predicts each next token: it needs attention='causal'.")
        check_llm(backbone.model)
        self.model = model
        self.self_prompt = self_prompt
        self.next_prompt = next_prompt
        self.num_tokens = num_tokens
        self.lm_head = lm_head
        self.form = form
        # Read at once: the trainer may wrap self.model later (DDP, compile), which hides its modules.
        self.tokenizer = backbone.tokenizer
        self.max_seq_length = backbone.max_seq_length
        self.causal = backbone.attention == "causal"
        prompts = read_prompts(
            self.tokenizer, bool(backbone.add_eos), self.max_seq_length, self_prompt, next_prompt, num_tokens
        )
        self.prefix, self.text_start, self.end_ids, self.self_ids, self.next_ids = prompts
        # In a tuple, so that the weights are not registered twice.
        self.last_states = LastStates(model)
        self._llm = (backbone.model,)

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        columns = list(sentence_features)
        if len(columns) not in (2, 3):
            raise ValueError(
                f"PretextLoss takes the columns 'text', 'next' and perhaps 'target', got {len(columns)} columns. See "
                "st_llm_embed.data.consecutive_texts."
            )
        text_ids, next_ids, *target_ids = (_token_rows(features) for features in columns)
        starts = self._text_starts(columns[0], text_ids)
        joint = self.join_prompts(text_ids, columns[0]["input_ids"].device)
        hidden = self.last_states(self.model, joint.features)  # (batch, seq, dim)
        rows = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)
        parts = self.compute_loss_from_embeddings(
            [hidden[rows, joint.self_positions], hidden[rows, joint.next_positions]],
            [target_ids[0] if target_ids else _after(starts, text_ids), next_ids],
        )
        if self.form == "release":
            parts["ar"] = self._autoregressive_loss(hidden, joint.texts, starts)
        return parts

    def _text_starts(self, features: dict[str, Tensor], text_ids: list[list[int]]) -> list[int]:
        """Where each row's text begins, after BOS and what the prompts have before it."""
        if "instruction_mask" in features:
            return features["instruction_mask"].sum(dim=1).tolist()
        if self.prefix:
            raise ValueError(
                f"The pretext prompts begin with {self.prefix!r}, and the column 'text' does not. Pass "
                f"prompts={{'text': {self.prefix + '{text}'!r}}} in the training arguments, or use LLMEmbedTrainer."
            )
        return [self.text_start] * len(text_ids)

    def _autoregressive_loss(self, hidden: Tensor, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """Mean cross-entropy of each text's tokens given those before."""
        places = [
            (row, column)
            for row, (text, start) in enumerate(zip(texts, starts, strict=True))
            for column in range(max(start, 1), len(text))
        ]
        if not places:
            return hidden.sum() * 0.0
        rows, columns = torch.tensor(places, device=hidden.device).T
        states = hidden[rows, columns - 1]  # (tokens, dim)
        targets = torch.tensor([texts[row][column] for row, column in places], device=hidden.device)
        return ChunkedCrossEntropy.apply(states, *self._vocabulary_projection(), targets) / len(places)

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], targets: list[list[list[int]]]
    ) -> dict[str, Tensor]:
        """The two losses.

        Args:
            embeddings: EBAE's and EBAR's hidden states, each ``(batch, num_tokens, dim)``.
            targets: the token ids of every row's target text, for each. Special tokens and repetitions do not count.
        """
        special = set(self.tokenizer.all_special_ids)
        projection = self._vocabulary_projection()
        parts, with_targets = {}, 0
        for name, states, rows in zip(("ebae", "ebar"), embeddings, targets, strict=True):
            bags = [sorted(set(row) - special) for row in rows]
            with_targets += any(bags)
            logits = F.linear(states, *projection).amax(dim=1)  # (batch, vocabulary)
            parts[name] = bag_of_words_loss(logits, bags, "sum" if self.form == "paper" else "mean")
        if self.form == "release":
            parts = {name: part / (10 * max(with_targets, 1)) for name, part in parts.items()}
        return parts

    def _vocabulary_projection(self) -> tuple[Tensor, Tensor | None]:
        return vocabulary_projection(self._llm[0], self.lm_head)

    def join_prompts(self, text_ids: list[list[int]], device: torch.device) -> JointPrompts:
        """Both prompts of each text in one row, cut to the model's longest text.

        Args:
            text_ids: each row's tokens as the backbone's ``preprocess`` gives them, without padding.
            device: the device of the tensors.
        """
        longest_suffix = max(len(self.self_ids), len(self.next_ids))
        room = None if self.max_seq_length is None else self.max_seq_length - longest_suffix
        end = len(self.end_ids)
        texts = [(row[:-end] if end and row[-end:] == self.end_ids else row)[:room] for row in text_ids]
        return join_prompts(
            texts,
            self.self_ids,
            self.next_ids,
            num_tokens=self.num_tokens,
            pad=self.tokenizer.pad_token_id,
            causal=self.causal,
            device=device,
        )

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "self_prompt": self.self_prompt,
            "next_prompt": self.next_prompt,
            "num_tokens": self.num_tokens,
            "form": self.form,
        }

    @property
    def citation(self) -> str:
        return """
@misc{li2023llara,
    title={Making Large Language Models A Better Foundation For Dense Retrieval},
    author={Chaofan Li and Zheng Liu and Shitao Xiao and Yingxia Shao},
    year={2023},
    eprint={2312.15503},
    archivePrefix={arXiv},
    primaryClass={cs.CL},
    url={https://arxiv.org/abs/2312.15503},
}
"""


def bag_of_words_loss(logits: Tensor, bags: list[list[int]], reduction: str = "mean") -> Tensor:
    """Mean over rows of the mean, or sum, of ``-log softmax(logits)`` over the row's bag; empty bags do not count.

    Args:
        logits: the logits of the vocabulary, ``(batch, vocabulary)``.
        bags: each row's distinct token ids.
        reduction: ``"mean"`` or ``"sum"`` over a bag.
    """
    log_probabilities = logits.float().log_softmax(dim=-1)
    losses = [getattr(-log_probabilities[row, bag], reduction)() for row, bag in enumerate(bags) if bag]
    return torch.stack(losses).mean() if losses else logits.sum() * 0.0


def _after(starts: Sequence[int], rows: Sequence[list[int]]) -> list[list[int]]:
    return [row[start:] for start, row in zip(starts, rows, strict=True)]


def _token_rows(features: dict[str, Tensor]) -> list[list[int]]:
    """Each row's real tokens, padding on either side dropped."""
    ids, mask = features["input_ids"].tolist(), features["attention_mask"].tolist()
    return [[token for token, real in zip(*row, strict=True) if real] for row in zip(ids, mask, strict=True)]
