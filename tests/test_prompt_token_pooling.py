"""PromptTokenPooling against a loop."""

from __future__ import annotations

import pytest
import torch

from st_llm_embed import PromptTokenPooling


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_is_the_mean_of_the_last_tokens(num_tokens):
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])  # full, padded left, padded right
    tokens = torch.randn(3, 5, 4)
    pooled = PromptTokenPooling(4, num_tokens)({"token_embeddings": tokens, "attention_mask": mask})
    for row, real, embedding in zip(tokens, mask.bool(), pooled["sentence_embedding"], strict=True):
        torch.testing.assert_close(embedding, row[real][-num_tokens:].mean(dim=0))


def test_saves_and_refuses(tmp_path):
    PromptTokenPooling(4, 8).save(str(tmp_path))
    assert PromptTokenPooling.load(str(tmp_path)).get_config_dict() == {"embedding_dimension": 4, "num_tokens": 8}
    with pytest.raises(ValueError, match="num_tokens=0 must be at least 1"):
        PromptTokenPooling(4, 0)
