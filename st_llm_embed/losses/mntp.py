"""Masked next-token prediction: raw text teaches an LLM without its causal mask to use both sides.

LLM2Vec (arXiv 2404.05961, section 2), BidirLM (arXiv 2604.02045):

    text        the    cat    sat    on     the    mat
    input       the    _      sat    on     _      mat         attention: bidirectional
    predicted   cat <- state of "the"       the <- state of "on"

A masked token is predicted by the LLM's own LM head, from the state of the token before it, which is where the LLM has
learned to predict it. The settings are those of the released code (github.com/McGill-NLP/llm2vec:
``experiments/run_mntp.py``, ``train_configs/mntp``), but for one: it masks each token with the same probability, and
this the same share of each text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from sentence_transformers.base import BaseModel
from torch import Tensor, nn

from st_llm_embed.losses.chunked_cross_entropy import ChunkedCrossEntropy
from st_llm_embed.losses.lm_head import LastStates, backbone_of, logit_scale, logit_softcap, vocabulary_projection
from st_llm_embed.losses.token_masking import MASKINGS, MaskedTokens, mask_id_of, mask_tokens


class MNTPLoss(nn.Module):
    """Masked next-token prediction over the column ``text``.

    Works on any model whose first module is a bidirectional ``LLMBackbone``. What a text has beyond the model's
    longest is cut off. Special tokens, padding and a prompt are neither masked nor predicted, nor is a text's first
    token where nothing comes before it. While the model trains, each step has other masks, drawn from one number of
    torch's generator, which checkpoints keep; in evaluation a text's masks are always the same.

    Args:
        model: the model to adapt. Its pooling takes no part.
        mask_share: the share of a text's tokens that are masked, at least one: 0.2 for the Llama family in LLM2Vec,
            0.8 (with ``masking="all"``) for Mistral.
        masking: ``"bert"``: 80 % of the masked tokens become the mask token, 10 % a random one, 10 % stay.
            ``"all"``: all become the mask token.
        mask_token: the token that stands for masked ones. Default: the tokenizer's mask token, or else ``_``, as
            LLMs have none.
        lm_head: the vocabulary projection, a Linear from the hidden width to the vocabulary. Default: the LLM's input
            embeddings, where its config ties them to the LM head.

    Inputs:
        +---------+--------+
        | Columns | Labels |
        +=========+========+
        | text    | none   |
        +---------+--------+

    Returns:
        The mean cross-entropy of the batch's masked tokens, in nats; 0 where there are none.

    Raises:
        ValueError: if the model has no LLMBackbone, attends causally, has no tied LM head and none is given, or its
            vocabulary lacks the mask token; for a share outside of 0..1, and an unknown masking.
    """

    def __init__(
        self,
        model: BaseModel,
        mask_share: float = 0.2,
        masking: Literal["bert", "all"] = "bert",
        mask_token: str | None = None,
        lm_head: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        backbone = backbone_of(model, lm_head, "MNTPLoss")
        if backbone.attention != "bidirectional":
            raise ValueError(
                f"MNTPLoss predicts tokens from both sides, and the model has attention={backbone.attention!r}. "
                "Valid: 'bidirectional'. Build it so: build_model(base, recipe, attention='bidirectional')."
            )
        if not 0 < mask_share <= 1:
            raise ValueError(f"mask_share={mask_share} must be more than 0 and at most 1, such as 0.2.")
        if masking not in MASKINGS:
            raise ValueError(f"masking={masking!r} is unknown. Valid values: {', '.join(MASKINGS)}.")
        self.model = model
        self.mask_share = mask_share
        self.masking = masking
        self.mask_token = mask_token
        self.lm_head = lm_head
        # Read at once: the trainer may wrap self.model later (DDP, compile), which hides its modules.
        tokenizer = backbone.tokenizer
        self.mask_id = mask_id_of(tokenizer, mask_token)
        self.special_ids = torch.tensor(tokenizer.all_special_ids)
        words = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
        self.words = torch.tensor(sorted(words)) if masking == "bert" else None
        self.scale, self.softcap = logit_scale(backbone.config), logit_softcap(backbone.config)
        # In a tuple, so that the weights are not registered twice.
        self.last_states = LastStates(model)
        self._llm = (backbone.model,)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        columns = list(sentence_features)
        if len(columns) != 1:
            raise ValueError(
                f"MNTPLoss takes the column 'text' alone, got {len(columns)} columns. Use LLMEmbedTrainer, or leave "
                "the others out: rows.select_columns(['text'])."
            )
        (features,) = columns
        masked = self.mask(features)
        states = self.last_states(self.model, {**features, "input_ids": masked.input_ids})  # (batch, seq, dim)
        return self.compute_loss_from_embeddings(states, features["input_ids"], masked.chosen)

    def mask(self, features: dict[str, Tensor]) -> MaskedTokens:
        """The masks of a batch, as the backbone's ``preprocess`` gives it."""
        ids, real = features["input_ids"], features["attention_mask"].bool()
        maskable = real & ~torch.isin(ids, self.special_ids.to(ids.device))
        if "instruction_mask" in features:
            maskable &= ~features["instruction_mask"].bool()
        maskable[:, 0] = False  # there must be a state to predict it from
        maskable[:, 1:] &= real[:, :-1]
        # Not self.training: the trainer puts the model into evaluation, not its loss.
        draw = int(torch.randint(1 << 32, (), device="cpu")) if self._llm[0].training else 0
        return mask_tokens(ids, maskable, share=self.mask_share, mask_id=self.mask_id, words=self.words, draw=draw)

    def compute_loss_from_embeddings(self, states: Tensor, input_ids: Tensor, chosen: Tensor) -> Tensor:
        """The loss.

        Args:
            states: the last hidden states of the masked batch, ``(batch, seq, dim)``.
            input_ids: the token ids without masks, ``(batch, seq)``.
            chosen: True at the tokens to predict, ``(batch, seq)``; never in the first column.
        """
        before = states[:, :-1][chosen[:, 1:]] * self.scale  # (tokens, dim)
        targets = input_ids[chosen]
        if not len(targets):
            return states.sum() * 0.0
        weight, bias = vocabulary_projection(self._llm[0], self.lm_head)
        return ChunkedCrossEntropy.apply(before, weight, bias, targets, self.softcap) / len(targets)

    def get_config_dict(self) -> dict[str, Any]:
        return {"mask_share": self.mask_share, "masking": self.masking, "mask_token": self.mask_token}

    @property
    def citation(self) -> str:
        return """
@misc{behnamghader2024llm2vec,
    title={LLM2Vec: Large Language Models Are Secretly Powerful Text Encoders},
    author={Parishad BehnamGhader and Vaibhav Adlakha and Marius Mosbach and Dzmitry Bahdanau and Nicolas Chapados
        and Siva Reddy},
    year={2024},
    eprint={2404.05961},
    archivePrefix={arXiv},
    primaryClass={cs.CL},
    url={https://arxiv.org/abs/2404.05961},
}
"""
