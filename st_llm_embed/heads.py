"""What follows the LLM where a text is more, or other, than one dense vector.

- ``token_vectors``: late interaction (ColBERT, arXiv 2004.12832): a short vector for each token, ``(tokens, dim)``; a
  document's score is the sum over the query's tokens of the best match, here divided by their number.
- ``vocabulary_weights``: a weight for each token of the vocabulary (SPLADE, arXiv 2109.10086), most of them 0, out of
  the LLM's own LM head: ``max over the text of log(1 + relu(logits))``, ``(vocabulary,)``. Scores are dot products.

All modules are sentence-transformers' own, so that models of them load without code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from sentence_transformers.base.modules import Dense, Module, Normalize
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import nn


def token_vectors(
    embedding_dimension: int, *, token_dim: int = 128, skiplist_words: Sequence[str] = ()
) -> list[Module]:
    """A projection of the token embeddings, untrained, and what scores them.

    Args:
        embedding_dimension: the width of the LLM.
        token_dim: the number of dimensions of a token's vector.
        skiplist_words: the tokens of documents that get no vector, spelled as in the tokenizer's vocabulary: ``"."``,
            or ``"Ġ("`` with the space before it.

    Raises:
        ValueError: for ``token_dim`` below 1, or one text in place of the list.
    """
    if isinstance(skiplist_words, str):
        raise ValueError(
            f"skiplist_words={skiplist_words!r} is one text. Give a list of tokens: [{skiplist_words!r}]."
        )
    if token_dim < 1:
        raise ValueError(f"token_dim={token_dim} must be 1 or more.")
    return [
        _of_tokens(embedding_dimension, token_dim),
        MultiVectorMask(list(skiplist_words)),
        Normalize(module_input_name="token_embeddings"),
    ]


def vocabulary_weights(
    embedding_dimension: int,
    *,
    pooling_strategy: Literal["max", "sum"] = "max",
    activation_function: Literal["relu", "log1p_relu"] = "relu",
    chunk_size: int | None = None,
) -> list[Module]:
    """What pools the LM head's logits; ``lm_head_layer`` goes before it.

    Args:
        embedding_dimension: the width of the LLM.
        pooling_strategy: ``"max"`` over the text's tokens, or their ``"sum"``.
        activation_function: ``"relu"`` for log(1 + relu(x)); ``"log1p_relu"`` takes the logarithm twice, for fewer
            weights.
        chunk_size: the number of tokens whose logits are pooled at once, in memory's favour; it is not saved. Default:
            all of the text.

    Raises:
        ValueError: for another strategy or activation.
    """
    return [SpladePooling(pooling_strategy, activation_function, chunk_size=chunk_size)]


def lm_head_layer(weight: torch.Tensor, bias: torch.Tensor | None) -> Dense:
    """An LM head as a module: token embeddings to logits.

    Args:
        weight: ``(vocabulary, dim)``, which becomes the layer's own.
        bias: ``(vocabulary,)``, likewise.
    """
    vocabulary, dim = weight.shape
    return _of_tokens(dim, vocabulary, bias=bias is not None, init_weight=weight, init_bias=bias)


def _of_tokens(dim: int, to: int, *, bias: bool = False, **weights: torch.Tensor | None) -> Dense:
    linear = {"activation_function": nn.Identity(), "module_input_name": "token_embeddings"}
    return Dense(dim, to, bias=bias, **linear, **weights)
