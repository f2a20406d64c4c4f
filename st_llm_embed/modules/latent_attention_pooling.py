"""NV-Embed's latent attention pooling (arXiv 2405.17428, section 3.2, and the released NV-Embed-v2 code).

Every token queries a trained array of latents, whose keys and values do not depend on the text; a gated MLP follows;
the mean over the text's tokens is the embedding. Both steps are residual:

    h = t + softmax(q(norm(t)) k(norm(latents))ᵀ / sqrt(head_dim)) v(norm(latents)) · out        per token t
    h = h + mlp_out(value · GELU(gate)),  (value, gate) = mlp_in(norm(h))
    sentence_embedding = mean of h over the text's tokens

In: ``token_embeddings`` ``(batch, seq, dim)`` with ``attention_mask``, or ``(1, total, dim)`` with ``cu_seq_lens_q``
where the host flattens batches; optionally ``instruction_mask`` of the same shape as the mask. Out:
``sentence_embedding`` ``(batch, dim)``. Padding and the instruction never enter the layer.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.base.modules.module import Module
from torch import Tensor, nn


class LatentAttentionPooling(Module):
    """Latent attention, then the mean over tokens.

    Args:
        embedding_dimension: width of the token embeddings, and of the result.
        num_latents: rows of the trained latent array.
        num_heads: attention heads.
        head_dim: width of each head. Default: ``embedding_dimension // num_heads``, which suits small LLMs; NV-Embed
            uses 4096, the whole width, in each of its 8 heads.
        mlp_ratio: inner width of the MLP in units of ``embedding_dimension``.
        include_prompt: keep the prompt's tokens in the mean. NV-Embed leaves them out; they are attended to by the LLM
            either way. A text with no token but its prompt's is pooled over the prompt.

    Raises:
        ValueError: if a size is below 1, or ``head_dim`` is not given and ``num_heads`` does not divide the width.
    """

    config_keys = ["embedding_dimension", "num_latents", "num_heads", "head_dim", "mlp_ratio", "include_prompt"]

    def __init__(
        self,
        embedding_dimension: int,
        num_latents: int = 512,
        num_heads: int = 8,
        head_dim: int | None = None,
        mlp_ratio: int = 4,
        include_prompt: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "embedding_dimension": embedding_dimension,
            "num_latents": num_latents,
            "num_heads": num_heads,
            "head_dim": head_dim or 1,
            "mlp_ratio": mlp_ratio,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1.")
        if head_dim is None and embedding_dimension % num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide embedding_dimension={embedding_dimension}. Choose one that "
                "does, or give head_dim."
            )
        self.embedding_dimension = embedding_dimension
        self.num_latents = num_latents
        self.num_heads = num_heads
        self.head_dim = head_dim or embedding_dimension // num_heads
        self.mlp_ratio = mlp_ratio
        self.include_prompt = include_prompt
        inner = self.num_heads * self.head_dim
        self.latents = nn.Parameter(torch.randn(num_latents, embedding_dimension))
        self.token_norm = nn.LayerNorm(embedding_dimension)
        self.latent_norm = nn.LayerNorm(embedding_dimension)
        self.to_q = nn.Linear(embedding_dimension, inner, bias=False)
        self.to_kv = nn.Linear(embedding_dimension, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, embedding_dimension, bias=False)
        self.mlp_norm = nn.LayerNorm(embedding_dimension)
        self.mlp_in = nn.Linear(embedding_dimension, 2 * mlp_ratio * embedding_dimension)
        self.mlp_out = nn.Linear(mlp_ratio * embedding_dimension, embedding_dimension)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        tokens = features["token_embeddings"]
        in_text, row_of, batch = _real_tokens(features)
        if not self.include_prompt and "instruction_mask" in features:
            outside_prompt = in_text & (features["instruction_mask"] == 0)
            has_text = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
            has_text[row_of[outside_prompt]] = True
            in_text = torch.where(has_text[row_of], outside_prompt, in_text)
        attended = self.attend_to_latents(tokens[in_text])  # (total, dim)
        rows = row_of[in_text]  # (total,): which text each token belongs to
        # At least float32: half precision loses the mean of a long text.
        attended = attended.to(torch.promote_types(attended.dtype, torch.float32))
        sums = attended.new_zeros(batch, self.embedding_dimension).index_add(0, rows, attended)
        counts = rows.bincount(minlength=batch).clamp(min=1).unsqueeze(1)
        features["sentence_embedding"] = (sums / counts).to(tokens.dtype)
        return features

    def attend_to_latents(self, tokens: Tensor) -> Tensor:
        """The layer without its mean: ``(total, dim)`` tokens to ``(total, dim)``."""
        queries = self._split_heads(self.to_q(self.token_norm(tokens)))
        keys, values = self.to_kv(self.latent_norm(self.latents)).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(queries, self._split_heads(keys), self._split_heads(values))
        tokens = tokens + self.to_out(attended.squeeze(0).transpose(0, 1).flatten(1))
        value, gate = self.mlp_in(self.mlp_norm(tokens)).chunk(2, dim=-1)
        return tokens + self.mlp_out(value * F.gelu(gate))

    def _split_heads(self, projected: Tensor) -> Tensor:
        """``(length, heads * head_dim)`` to ``(1, heads, length, head_dim)``."""
        return projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(0, 1).unsqueeze(0)

    def get_embedding_dimension(self) -> int:
        return self.embedding_dimension

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)
        # NOTE: sentence-transformers copies a repository's module code into this sub-folder, but looks for it in the
        # root when it loads, so a copy re-saved by plain sentence-transformers needs this one too.
        if __name__.startswith("transformers_modules."):
            shutil.copy(__file__, Path(output_path).parent)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> LatentAttentionPooling:
        where = {k: kwargs.get(k) for k in ("token", "cache_folder", "revision")}
        where["local_files_only"] = kwargs.get("local_files_only", False)
        config = cls.load_config(model_name_or_path, subfolder=subfolder, **where)
        return cls.load_torch_weights(model_name_or_path, subfolder=subfolder, model=cls(**config), **where)


def _real_tokens(features: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Where the real tokens are and whose they are: mask and row index shaped as the tokens, and the number of
    texts."""
    if "cu_seq_lens_q" in features:
        lengths = features["cu_seq_lens_q"].diff()  # (batch,)
        row_of = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths).unsqueeze(0)
        return torch.ones_like(row_of, dtype=torch.bool), row_of, len(lengths)
    in_text = features["attention_mask"].bool()  # (batch, seq)
    row_of = torch.arange(len(in_text), device=in_text.device).unsqueeze(1).expand_as(in_text)
    return in_text, row_of, len(in_text)
