"""LLaRA's pooling (arXiv 2312.15503): the mean over the last tokens of the prompt that follows the text.

The paper's prompts end in one EOS token, ``"{text} The next sentence:" + EOS``; the released code's end in eight added
tokens. Their hidden states say what the text (EBAE) or its successor (EBAR) is about.

In: ``token_embeddings`` ``(batch, seq, dim)`` with ``attention_mask`` ``(batch, seq)``, padded on either side. Out:
``sentence_embedding`` ``(batch, dim)``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules.module import Module


class PromptTokenPooling(Module):
    """Mean over each text's last ``num_tokens`` tokens (all of them where the text has fewer).

    Args:
        embedding_dimension: the width of the token embeddings, and of the result.
        num_tokens: how many last tokens to average: 1 for the paper's prompts, 8 for the released code's.

    Raises:
        ValueError: if ``num_tokens`` is below 1.
    """

    config_keys = ["embedding_dimension", "num_tokens"]

    def __init__(self, embedding_dimension: int, num_tokens: int = 1) -> None:
        super().__init__()
        if num_tokens < 1:
            raise ValueError(f"num_tokens={num_tokens} must be at least 1.")
        self.embedding_dimension = embedding_dimension
        self.num_tokens = num_tokens

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        tokens = features["token_embeddings"]
        mask = features["attention_mask"]  # (batch, seq)
        from_the_end = mask.flip(1).cumsum(dim=1).flip(1)  # 1 at each row's last token, 2 at the one before, ...
        weights = (mask.bool() & (from_the_end <= self.num_tokens)).to(torch.float32)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        pooled = torch.einsum("bs,bsd->bd", weights, tokens.float())  # float32: the sum of half precision states
        features["sentence_embedding"] = pooled.to(tokens.dtype)
        return features

    def get_embedding_dimension(self) -> int:
        return self.embedding_dimension

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        self.save_config(output_path)
        # NOTE: sentence-transformers copies a repository's module code into this sub-folder, but looks for it in the
        # root when it loads, so a copy re-saved by plain sentence-transformers needs this one too.
        if __name__.startswith("transformers_modules."):
            shutil.copy(__file__, Path(output_path).parent)
