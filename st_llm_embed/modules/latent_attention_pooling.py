"""NV-Embed's latent attention pooling (arXiv 2405.17428, section 3.2, and the released NV-Embed-v2 code).

Every token queries a trained array of latents, whose keys and values do not depend on the text; a gated MLP follows;
the mean over the text's tokens is the embedding. Both steps are residual:

    h = t + softmax(q(norm(t)) k(norm(latents))ᵀ / sqrt(head_dim)) v(norm(latents)) · out        per token t
    h = h + mlp_out(value · GELU(gate)),  (value, gate) = mlp_in(norm(h))
    sentence_embedding = mean of h over the text's tokens

Three facts make it cheap, and change nothing. Keys and values depend on the weights alone, so they are computed once,
not per text. Multiplied into ``to_q`` and ``to_out`` they become two matrices of ``(heads * latents, dim)``, which is
less work wherever ``head_dim`` is large, as in NV-Embed. And the mean commutes with ``mlp_out``, which then runs once
per text.

In: ``token_embeddings`` ``(batch, seq, dim)`` with ``attention_mask``, or ``(1, total, dim)`` with ``cu_seq_lens_q``
where the host flattens batches; optionally ``instruction_mask`` of the same shape as the mask. Out:
``sentence_embedding`` ``(batch, dim)``. Padding and the instruction never enter the layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.base.modules.module import Module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MLPS = ("geglu", "gelu", None)
CHUNK = 512  # tokens: what is alive at once without gradients, however many texts there are


class LatentAttentionPooling(Module):
    """Latent attention, then the mean over tokens.

    Weights: ``latents``, ``latent_norm``, ``to_kv`` (keys, then values), ``token_norm``, ``to_q``, ``to_out``,
    ``mlp_norm``, ``mlp_in`` (of ``geglu``: values, then gates), ``mlp_out``.

    Args:
        embedding_dimension: the width of the token embeddings, and of the result.
        num_latents: the number of rows of the trained latent array.
        num_heads: the number of attention heads.
        head_dim: the width of each head. Default: ``embedding_dimension // num_heads``, which suits small LLMs;
            NV-Embed uses 4096, the whole width, in each of its 8 heads.
        mlp_ratio: the inner width of the MLP in units of ``embedding_dimension``.
        mlp: ``"geglu"`` as in the released code, ``"gelu"`` as the paper writes, or None for no MLP.
        include_prompt: whether the prompt's tokens count in the mean. NV-Embed leaves them out; they are attended to
            by the LLM either way. A text with no token but its prompt's is pooled over the prompt.
        normalize: whether to scale the result to length 1, as a ``Normalize`` module after it would.

    Raises:
        ValueError: if a size is below 1, ``head_dim`` is not given and ``num_heads`` does not divide the width, or
            ``mlp`` is unknown.
    """

    config_keys = [
        "embedding_dimension",
        "num_latents",
        "num_heads",
        "head_dim",
        "mlp_ratio",
        "mlp",
        "include_prompt",
        "normalize",
    ]

    def __init__(
        self,
        embedding_dimension: int,
        num_latents: int = 512,
        num_heads: int = 8,
        head_dim: int | None = None,
        mlp_ratio: int = 4,
        mlp: str | None = "geglu",
        include_prompt: bool = False,
        normalize: bool = False,
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
        if mlp not in MLPS:
            raise ValueError(f"mlp={mlp!r} is unknown. Valid values: {', '.join(map(repr, MLPS))}.")
        self.embedding_dimension = embedding_dimension
        self.num_latents = num_latents
        self.num_heads = num_heads
        self.head_dim = head_dim or embedding_dimension // num_heads
        self.mlp_ratio = mlp_ratio
        self.mlp = mlp
        self.include_prompt = include_prompt
        self.normalize = normalize
        inner = self.num_heads * self.head_dim
        self.latents = nn.Parameter(torch.randn(num_latents, embedding_dimension))
        self.token_norm = nn.LayerNorm(embedding_dimension)
        self.latent_norm = nn.LayerNorm(embedding_dimension)
        self.to_q = nn.Linear(embedding_dimension, inner, bias=False)
        self.to_kv = nn.Linear(embedding_dimension, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, embedding_dimension, bias=False)
        if mlp is not None:
            width = mlp_ratio * embedding_dimension
            self.mlp_norm = nn.LayerNorm(embedding_dimension)
            self.mlp_in = nn.Linear(embedding_dimension, 2 * width if mlp == "geglu" else width)
            self.mlp_out = nn.Linear(width, embedding_dimension)
        self.gradient_checkpointing = False
        self._cache: tuple[tuple, Tensor, tuple[Tensor, Tensor]] | None = None

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        tokens = features["token_embeddings"]
        if tokens.shape[-1] != self.embedding_dimension:
            raise ValueError(
                f"token_embeddings are {tokens.shape[-1]} wide, but this layer was built with embedding_dimension="
                f"{self.embedding_dimension}."
            )
        in_text, row_of, batch = _real_tokens(features)
        if not self.include_prompt and "instruction_mask" in features:
            outside_prompt = in_text & (features["instruction_mask"] == 0)
            has_text = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
            has_text[row_of[outside_prompt]] = True
            in_text = torch.where(has_text[row_of], outside_prompt, in_text)
        rows = row_of[in_text]  # (total,): which text each token belongs to
        places = in_text.flatten().nonzero().squeeze(1)  # (total,): where it is
        flat = tokens.flatten(0, 1)  # (batch * seq, dim)
        folded = self._is_folding_cheaper(len(rows))
        latents = self._fold_latents() if folded else self._project_latents()
        # At least float32: half precision loses the sum of a long text.
        exact = torch.promote_types(tokens.dtype, torch.float32)
        sums = torch.zeros(batch, self.embedding_dimension, dtype=exact, device=tokens.device)
        inner_sums = None
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        size = CHUNK if checkpointing or not torch.is_grad_enabled() else max(len(rows), 1)
        for chunk, row in zip(places.split(size), rows.split(size), strict=True):
            # A layer in float32 behind an LLM in half precision is exact, and not an error.
            arguments = (flat[chunk].to(self.latents.dtype), *latents, folded)
            if checkpointing:
                attended, inner = checkpoint(self._steps_per_token, *arguments, use_reentrant=False)
            else:
                attended, inner = self._steps_per_token(*arguments)
            sums = sums.index_add(0, row, attended.to(exact))
            if inner is not None:
                if inner_sums is None:
                    inner_sums = torch.zeros(batch, inner.shape[1], dtype=exact, device=tokens.device)
                inner_sums = inner_sums.index_add(0, row, inner.to(exact))
        counts = rows.bincount(minlength=batch).clamp(min=1).unsqueeze(1)
        pooled = sums / counts
        if inner_sums is not None:
            pooled = pooled + self.mlp_out((inner_sums / counts).to(self.mlp_out.weight.dtype)).to(exact)
        if self.normalize:
            pooled = F.normalize(pooled, dim=-1)
        features["sentence_embedding"] = pooled.to(tokens.dtype)
        return features

    def attend_to_latents(self, tokens: Tensor) -> Tensor:
        """The layer without its mean: ``(total, dim)`` tokens to ``(total, dim)``."""
        attended, inner = self._steps_per_token(tokens, *self._project_latents(), folded=False)
        return attended if inner is None else attended + self.mlp_out(inner)

    def _is_folding_cheaper(self, tokens: int) -> bool:
        """Multiply-adds of the folded form against the plain one's; the folding itself counts where it is not kept."""
        if type(self.to_q) is not nn.Linear or type(self.to_out) is not nn.Linear:  # an adapter adds to its output
            return False
        inner = self.num_heads * self.head_dim
        saved = inner * (self.embedding_dimension + self.num_latents) - (
            self.num_heads * self.num_latents * self.embedding_dimension
        )
        return tokens * saved > (0 if self._may_cache() else self.num_latents * inner * self.embedding_dimension)

    def _steps_per_token(
        self, tokens: Tensor, keys: Tensor, values: Tensor, folded: bool
    ) -> tuple[Tensor, Tensor | None]:
        """All that must be done token by token: ``(chunk, dim)``, and ``(chunk, mlp_ratio * dim)`` where there is an
        MLP."""
        attended = self._attend(tokens, (keys, values), folded)
        return attended, None if self.mlp is None else self._mlp_inner(attended)

    def _attend(self, tokens: Tensor, latents: tuple[Tensor, Tensor], folded: bool) -> Tensor:
        """``(total, dim)`` tokens, each with what it reads from the latents."""
        keys, values = latents
        queries = self.token_norm(tokens)
        if folded:
            scores = queries @ keys.to(queries.dtype).T  # (total, heads * latents)
            weights = scores.unflatten(1, (self.num_heads, -1)).softmax(
                dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)
            )
            return tokens + weights.flatten(1).to(queries.dtype) @ values.to(queries.dtype)
        queries = self._split_heads(self.to_q(queries))
        attended = F.scaled_dot_product_attention(queries, keys.to(queries.dtype), values.to(queries.dtype))
        return tokens + self.to_out(attended.squeeze(0).transpose(0, 1).flatten(1))

    def _mlp_inner(self, tokens: Tensor) -> Tensor:
        """``(total, mlp_ratio * dim)``: what ``mlp_out`` reads."""
        inner = self.mlp_in(self.mlp_norm(tokens))
        if self.mlp == "gelu":
            return F.gelu(inner)
        value, gate = inner.chunk(2, dim=-1)
        return value * F.gelu(gate)

    def _project_latents(self) -> tuple[Tensor, Tensor]:
        """The latents' keys and values, each ``(1, heads, latents, head_dim)``."""
        return self._kept("plain", self._compute_keys_and_values)

    def _fold_latents(self) -> tuple[Tensor, Tensor]:
        """The same multiplied into ``to_q`` (with the scale) and ``to_out``, each ``(heads * latents, dim)``."""
        return self._kept("folded", self._compute_fold)

    def _compute_keys_and_values(self) -> tuple[Tensor, Tensor]:
        keys, values = self.to_kv(self.latent_norm(self.latents)).chunk(2, dim=-1)
        return self._split_heads(keys), self._split_heads(values)

    def _compute_fold(self) -> tuple[Tensor, Tensor]:
        keys, values = (states.squeeze(0) for states in self._compute_keys_and_values())  # (heads, latents, head_dim)
        q_weight = self.to_q.weight.unflatten(0, (self.num_heads, -1))  # (heads, head_dim, dim)
        out_weight = self.to_out.weight.unflatten(1, (self.num_heads, -1)).transpose(0, 1)  # (heads, dim, head_dim)
        exact = torch.promote_types(self.latents.dtype, torch.float32)
        # Products of two weights, rounded once: half precision would round the sum over head_dim as well.
        with torch.autocast(self.latents.device.type, enabled=False):
            folded_keys = keys.to(exact) @ q_weight.to(exact) * self.head_dim**-0.5
            folded_values = values.to(exact) @ out_weight.to(exact).transpose(1, 2)
        return folded_keys.flatten(0, 1), folded_values.flatten(0, 1)

    def _may_cache(self) -> bool:
        return not self.training and not torch.is_grad_enabled()

    def _kept(self, form: str, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What depends on the weights alone is computed once in evaluation, and again when a weight has changed.

        In-place changes show in the version counters, moved weights in their addresses, and changes of ``.data``, as
        peft's merging makes them, in a sum over every so many elements.
        """
        if not self._may_cache():
            return compute()
        parts = (self.latent_norm, self.to_q, self.to_kv, self.to_out)
        weights = [self.latents, *(weight for part in parts for weight in part.parameters())]
        # NOTE: weights that were made under torch.inference_mode() count no versions.
        versions = [None if weight.is_inference() else weight._version for weight in weights]
        key = (form, torch.is_autocast_enabled(), *versions, *((w.data_ptr(), w.dtype, w.device) for w in weights))
        sample = torch.stack([w.flatten()[:: max(1, w.numel() // 997)].float().sum() for w in weights])
        if self._cache is None or self._cache[0] != key or not torch.equal(self._cache[1], sample):
            self._cache = (key, sample, compute())
        return self._cache[2]

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """What sentence-transformers calls on every module that has it: compute chunks of tokens again for their
        gradients, instead of keeping what they need. The arguments are for the LLM's layers (``every_n_layers``)."""
        self.gradient_checkpointing = True

    def train(self, mode: bool = True) -> LatentAttentionPooling:
        self._cache = None
        return super().train(mode)

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
        hub_arguments = {k: kwargs.get(k) for k in ("token", "cache_folder", "revision")}
        hub_arguments["local_files_only"] = kwargs.get("local_files_only", False)
        config = cls.load_config(model_name_or_path, subfolder=subfolder, **hub_arguments)
        return cls.load_torch_weights(model_name_or_path, subfolder=subfolder, model=cls(**config), **hub_arguments)


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
