"""sentence-transformers' own poolings leave out exactly the prompt, row by row: each mode, side and kind of prompt."""

from __future__ import annotations

import pytest
import torch
from conftest import save_llm, train_tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from st_llm_embed import LLMBackbone, build_model
from st_llm_embed.hub import seal

TEXTS = ["cat", "how do I parse", "日本語", "7 dogs", ""]  # whose first tokens share the prompt's space, or do not
PROMPTS = ["Query: ", "Query:", "Instruct: find it\nQuery: ", 'Quote:"{text}" The next', "Query: {text} The next"]


def pool(mode: str, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """``(length, dim)`` of one text, the first ``start`` of which are the prompt's."""
    kept = tokens[start:]
    position = torch.arange(1.0 + start, 1.0 + len(tokens)).unsqueeze(1)  # the host's: in the whole text
    return {
        "cls": lambda: kept[0],
        "lasttoken": lambda: kept[-1],
        "max": lambda: kept.amax(dim=0),
        "mean": lambda: kept.mean(dim=0),
        "mean_sqrt_len_tokens": lambda: kept.sum(dim=0) / len(kept) ** 0.5,
        "weightedmean": lambda: (kept * position).sum(dim=0) / position.sum(),
    }[mode]()


@pytest.fixture(scope="module", params=[True, False], ids=["byte-level", "metaspace"])
def backbone(request, tmp_path_factory) -> LLMBackbone:
    folder = tmp_path_factory.mktemp("llm")
    return LLMBackbone(save_llm(folder, tokenizer=train_tokenizer(byte_level=request.param))).eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", [*Pooling.POOLING_MODES, ("mean", "lasttoken")])
def test_each_mode_pools_the_text_alone(backbone, mode, side):
    backbone.tokenizer.padding_side = side
    model = SentenceTransformer(modules=[backbone, Pooling(32, mode, include_prompt=False)])
    modes = [mode] if isinstance(mode, str) else mode
    for prompt in PROMPTS:
        features = model.preprocess(TEXTS, prompt=prompt)
        given = features["attention_mask"].clone()
        with torch.no_grad():
            out = model(features)
        assert torch.equal(out["attention_mask"], given)
        rows = zip(
            out["token_embeddings"], given.bool(), out["instruction_mask"], out["sentence_embedding"], strict=True
        )
        for tokens, real, instruction, found in rows:
            expected = torch.cat([pool(mode, tokens[real], int(instruction.sum())) for mode in modes])
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_it_may_be_switched_on_and_survives_loading(llm, tmp_path):
    model = build_model(llm, "mean")
    whole = model.encode(TEXTS, prompt="Query: ", convert_to_tensor=True)
    model.set_pooling_include_prompt(False)
    text = model.encode(TEXTS, prompt="Query: ", convert_to_tensor=True)
    assert (whole - text).abs().max() > 1e-2
    with torch.no_grad():
        states = model[0](model.preprocess(["cat"], prompt="Query: "))["token_embeddings"][0]
    expected = torch.nn.functional.normalize(states[3:].mean(dim=0), dim=0)  # <s> Query : | ␣cat </s>
    torch.testing.assert_close(text[0], expected, atol=1e-6, rtol=1e-5)
    folder = tmp_path / "sealed"
    model.save_pretrained(str(folder))
    seal(folder)
    again = SentenceTransformer(str(folder), trust_remote_code=True)
    torch.testing.assert_close(again.encode(TEXTS, prompt="Query: ", convert_to_tensor=True), text)


def test_a_text_that_is_all_prompt_is_pooled_over_it(tmp_path):
    llm = save_llm(tmp_path, tokenizer=train_tokenizer())
    for mode in Pooling.POOLING_MODES:
        model = build_model(llm, "mean", add_eos=False, pooling_mode=mode, include_prompt=False)
        found, cat = model.encode(["", "cat"], prompt="Query:", convert_to_tensor=True)
        model.set_pooling_include_prompt(True)
        expected, whole = model.encode(["", "cat"], prompt="Query:", convert_to_tensor=True)
        torch.testing.assert_close(found, expected)
        assert mode == "lasttoken" or not torch.allclose(cat, whole, atol=1e-4), mode
