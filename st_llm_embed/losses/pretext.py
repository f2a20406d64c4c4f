"""LLaRA's two pretext tasks on raw text, in one pass (arXiv 2312.15503, section 3).

    EBAE   the embedding of "{text} The original sentence:" predicts the words of the text itself
    EBAR   the embedding of "{text} The next sentence:"     predicts the words of the text that follows

Both are a bag-of-words cross-entropy through the LLM's own vocabulary projection W: -log softmax(W e) averaged over
the target's set of tokens. One pass serves both: the two suffixes stand one after the other, cannot see each other,
and both start at the position after the text:

    position    0 1 2 3 | 4 5 6 7 | 4 5 6 7
    tokens      t e x t | S E L F | N E X T        SELF sees text and SELF, NEXT sees text and NEXT, text sees text
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from st_llm_embed.modules import LLMBackbone
from st_llm_embed.tasks import EBAE_PROMPT, EBAR_PROMPT

TEXT, SELF, NEXT, PAD = range(4)


@dataclass
class JointPrompts:
    """A batch of texts with both suffixes: the backbone's features and where the two embeddings are."""

    features: dict[str, Tensor]
    self_positions: Tensor  # (batch, num_tokens): the last tokens of SELF
    next_positions: Tensor  # (batch, num_tokens): the last tokens of NEXT


class PretextLoss(nn.Module):
    """EBAE + EBAR over the columns ``text`` and ``next``.

    Works on any model whose first module is an ``LLMBackbone``, in the backbone's own attention mode. The released
    code divides its terms by 10 and adds an autoregressive loss; the paper sums over tokens where this averages, so
    that the parts read as nats per word.

    Args:
        model: the model to adapt. Its pooling takes no part.
        self_prompt: EBAE's prompt, ``{text}`` first.
        next_prompt: EBAR's prompt, ``{text}`` first.
        num_tokens: how many last tokens of each prompt carry the embedding. Where several do, the vocabulary logits
            are their element-wise maximum, as in the released code.
        lm_head: the vocabulary projection, a Linear from the hidden width to the vocabulary. Default: the LLM's input
            embeddings, where its config ties them to the LM head.

    Inputs:
        +-------------+--------+
        | Columns     | Labels |
        +=============+========+
        | text, next  | none   |
        +-------------+--------+

        ``next`` may be empty: such rows count in EBAE only.

    Returns:
        ``{"ebae": ..., "ebar": ...}``, which the trainer adds up and logs by name.

    Raises:
        ValueError: if the model has no LLMBackbone, no tied LM head and none is given, or the prompts do not begin
            with ``{text}``.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        self_prompt: str = EBAE_PROMPT,
        next_prompt: str = EBAR_PROMPT,
        num_tokens: int = 1,
        lm_head: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        backbone = model[0]
        if not isinstance(backbone, LLMBackbone):
            raise ValueError(
                f"PretextLoss needs an LLMBackbone as the model's first module, not {type(backbone).__name__}. Build "
                "the model with build_model, or with SentenceTransformer(modules=[LLMBackbone(...), ...])."
            )
        if lm_head is None and not backbone.config.get_text_config().tie_word_embeddings:
            raise ValueError(
                f"{backbone.config.model_type!r} does not tie its LM head to its input embeddings. Pass "
                "lm_head=AutoModelForCausalLM.from_pretrained(base).get_output_embeddings()."
            )
        for prompt in (self_prompt, next_prompt):
            if not prompt.startswith("{text}"):
                raise ValueError(f"The pretext prompt {prompt!r} must begin with '{{text}}'.")
        self.model = model
        self.self_prompt = self_prompt
        self.next_prompt = next_prompt
        self.num_tokens = num_tokens
        self.lm_head = lm_head
        # Read at once: the trainer may wrap self.model later (DDP, compile), which hides its modules.
        self.tokenizer = backbone.tokenizer
        self.max_seq_length = backbone.max_seq_length
        self.causal = backbone.attention == "causal"
        self.add_eos = backbone.add_eos
        eos = [self.tokenizer.eos_token_id] if backbone.add_eos else []
        self.self_ids = backbone.tokenize_suffix(self_prompt.removeprefix("{text}")) + eos
        self.next_ids = backbone.tokenize_suffix(next_prompt.removeprefix("{text}")) + eos
        for prompt, ids in ((self_prompt, self.self_ids), (next_prompt, self.next_ids)):
            if not 1 <= num_tokens <= len(ids):
                raise ValueError(f"num_tokens={num_tokens} is outside 1..{len(ids)}, the length of {prompt!r}.")
        # In a tuple, so that the weights are not registered twice.
        self._tied_embeddings = (backbone.model.get_input_embeddings(),)

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        columns = list(sentence_features)
        if len(columns) != 2:
            raise ValueError(
                f"PretextLoss takes the columns 'text' and 'next', got {len(columns)} columns. See "
                "st_llm_embed.data.consecutive_paragraphs."
            )
        text_ids, next_ids = (_token_rows(features) for features in columns)
        joint = self.join_prompts(text_ids, columns[0]["input_ids"].device)
        # Through the whole model, not its backbone alone: a DDP wrapper synchronises gradients in its forward only.
        hidden = self.model(joint.features)["token_embeddings"]  # (batch, seq, dim)
        rows = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)
        return self.compute_loss_from_embeddings(
            [hidden[rows, joint.self_positions], hidden[rows, joint.next_positions]],
            [text_ids, next_ids],
        )

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], targets: list[list[list[int]]]
    ) -> dict[str, Tensor]:
        """The two losses.

        Args:
            embeddings: EBAE's and EBAR's hidden states, each ``(batch, num_tokens, dim)``.
            targets: for each, the token ids of every row's target text. Special tokens and repetitions do not count.
        """
        special = set(self.tokenizer.all_special_ids)
        parts = {}
        for name, states, rows in zip(("ebae", "ebar"), embeddings, targets, strict=True):
            bags = [sorted(set(row) - special) for row in rows]
            logits = self._project(states).amax(dim=1)  # (batch, vocabulary)
            parts[name] = bag_of_words_loss(logits, bags)
        return parts

    def _project(self, states: Tensor) -> Tensor:
        if self.lm_head is not None:
            return self.lm_head(states)
        return F.linear(states, self._tied_embeddings[0].weight)

    def join_prompts(self, text_ids: list[list[int]], device: torch.device) -> JointPrompts:
        """Build ``text SELF NEXT`` for a batch, padded on the right.

        Args:
            text_ids: each row's tokens as the backbone's ``preprocess`` gives them, without padding.
            device: where to put the tensors.
        """
        room = self.max_seq_length - max(len(self.self_ids), len(self.next_ids))
        texts = [(row[:-1] if self.add_eos else row)[:room] for row in text_ids]
        tail = len(self.self_ids) + len(self.next_ids)
        seq = max(map(len, texts)) + tail
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor(
            [row + self.self_ids + self.next_ids + [pad] * (seq - tail - len(row)) for row in texts], device=device
        )
        length = torch.tensor([[len(row)] for row in texts], device=device)  # (batch, 1)
        columns = torch.arange(seq, device=device).expand_as(input_ids)
        next_start = length + len(self.self_ids)
        block = TEXT + sum(
            (columns >= start).long() for start in (length, next_start, next_start + len(self.next_ids))
        )
        # NEXT restarts where SELF started, so that each suffix stands as if the other were not there.
        position_ids = columns - (block >= NEXT) * len(self.self_ids)
        query, key = block.unsqueeze(2), block.unsqueeze(1)
        structured_mask = (key == TEXT) & (query != PAD) | (key == query)  # padding sees padding: no empty row
        if self.causal:
            structured_mask &= torch.ones(seq, seq, dtype=torch.bool, device=device).tril()
        last = torch.arange(-self.num_tokens, 0, device=device)
        return JointPrompts(
            {
                "input_ids": input_ids,
                "attention_mask": (block != PAD).long(),
                "position_ids": position_ids,
                "structured_mask": structured_mask,
            },
            self_positions=next_start + last,
            next_positions=next_start + len(self.next_ids) + last,
        )

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "self_prompt": self.self_prompt,
            "next_prompt": self.next_prompt,
            "num_tokens": self.num_tokens,
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


def bag_of_words_loss(logits: Tensor, bags: list[list[int]]) -> Tensor:
    """Mean over rows of the mean of ``-log softmax(logits)`` over the row's bag; rows with an empty bag do not count.

    Args:
        logits: ``(batch, vocabulary)``.
        bags: each row's distinct token ids.
    """
    log_probabilities = logits.float().log_softmax(dim=-1)
    losses = [-log_probabilities[row, bag].mean() for row, bag in enumerate(bags) if bag]
    return torch.stack(losses).mean() if losses else logits.sum() * 0.0


def _token_rows(features: dict[str, Tensor]) -> list[list[int]]:
    """Each row's real tokens, padding on either side dropped."""
    ids, mask = features["input_ids"].tolist(), features["attention_mask"].tolist()
    return [[token for token, real in zip(*row, strict=True) if real] for row in zip(ids, mask, strict=True)]
