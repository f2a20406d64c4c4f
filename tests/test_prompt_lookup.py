"""Which tokens are the prompt's, told by ids alone: as the offsets tell, whatever follows the prompt."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import TEXTS, save_llm, train_tokenizer
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from st_llm_embed import build_model
from st_llm_embed.modules.prompt_tokens import exact_instruction_mask
from st_llm_embed.modules.special_tokens import append_eos
from st_llm_embed.serving.prompt_lookup import PROBES, PromptLookup

PROMPTS = [
    "Query: ",
    "Query:",
    "a\n",
    "Instruct: Given a question, retrieve\nQuery: ",
    "日本語：",
    "Return the sum.",
    "  ",
]
LETTERS = ["the ", "search", "Q", "e"]  # which the text's first word may join
PIECES = [*"abcQueryzABC 0123456789.,:;!?-_'\"()\n\t", *PROBES, "the", "cat", "quick brown", "日", "e\u0301", "\u0301"]


def tokenizer(kind: str, bos: bool) -> PreTrainedTokenizerFast:
    made = train_tokenizer(kind == "byte-level", bos)
    spaces = normalizers.Replace(" ", "▁")
    if kind == "Llama 2":
        made.backend_tokenizer.pre_tokenizer = None
        made.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    if kind == "Gemma":
        made.backend_tokenizer.pre_tokenizer = None
        made.backend_tokenizer.normalizer = spaces
    append_eos(made)
    made.pad_token = "</s>"
    return made


def compare(tokenizer: PreTrainedTokenizerFast, prompt: str, texts: list[str]) -> int:
    """Compare with the offsets, padded on both sides; gives the number of rows whose prompt ends within a token."""
    lookup = PromptLookup(tokenizer.backend_tokenizer, [prompt, "Another prompt of the model: "])
    for side in ("left", "right"):
        tokenizer.padding_side = side
        rows = tokenizer(
            [prompt + text for text in texts], padding=True, return_offsets_mapping=True, return_tensors="pt"
        )
        expected = exact_instruction_mask(rows["offset_mapping"], rows, len(prompt))
        torch.testing.assert_close(lookup(rows["input_ids"], rows["attention_mask"]), expected)
    alone = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    before = lookup.before
    return int((expected.sum(dim=1) < alone + before).sum())


@pytest.mark.parametrize(
    ("kind", "bos", "prompts"),
    [
        ("byte-level", True, PROMPTS + LETTERS),
        ("metaspace", False, PROMPTS + LETTERS),
        ("Llama 2", True, ["Query: ", "search"]),
        ("Gemma", False, ["Query: ", "the "]),
    ],
)
def test_it_tells_what_the_offsets_tell(kind, bos, prompts):
    choose = random.Random(0)
    texts = [*TEXTS, *("".join(choose.choices(PIECES, k=choose.randrange(7))) for _ in range(80))]
    joined = sum(compare(tokenizer(kind, bos), prompt, texts) for prompt in prompts)
    assert joined > 10  # rows whose prompt ends within a token are among them


@pytest.mark.slow
def test_it_tells_what_the_offsets_tell_with_smollm2s_tokenizer():
    from examples.demo.llm import bundled_llm

    smollm2 = build_model(str(bundled_llm()), "mean", num_layers=1).tokenizer
    choose = random.Random(0)
    texts = [*TEXTS, *("".join(choose.choices(PIECES, k=choose.randrange(7))) for _ in range(1000))]
    assert sum(compare(smollm2, prompt, texts) for prompt in (*PROMPTS, *LETTERS)) > 100


def test_a_text_without_the_prompt_has_none_unless_it_says_the_same():
    own = tokenizer("metaspace", True)
    lookup = PromptLookup(own.backend_tokenizer, ["Query: ", "Query: how do ", "Instruct: "])
    texts = ["Query the cat", "Quer", "query: the cat", " Query", "Query:the cat", "", "Instruct", "Query: how does"]
    rows = own([*texts, "Query: the cat", "Query: how do I"], padding=True, return_tensors="pt")
    found = lookup(rows["input_ids"], rows["attention_mask"]).sum(dim=1).tolist()
    shorter = own("Query: how does", return_offsets_mapping=True)["offset_mapping"]
    expected = sum(end <= len("Query: ") for _, end in shorter[:-1])
    assert found[:7] == [0] * 7 and found[7] == expected
    assert 0 < found[8] < found[9]  # of two prompts the longer


def test_what_cannot_be_told_is_refused_when_it_is_prepared():
    own = tokenizer("byte-level", True)
    own.backend_tokenizer.normalizer = normalizers.NFC()
    PromptLookup(own.backend_tokenizer, ["Query: ", "Query:", "a\n"])
    with pytest.raises(ValueError, match=r"the prompt 'search' joins with a text .* End it with a colon"):
        PromptLookup(own.backend_tokenizer, ["search"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("byte_level", [True, False])
def test_templates_and_columns_are_those_of_the_backbone(tmp_path, side, byte_level):
    """``{text}`` with parts of their own on both sides, and NV-Embed's count of columns."""
    base = save_llm(tmp_path, tokenizer=train_tokenizer(byte_level))
    prompts = {
        "whole": 'Passage:"{text}", summarize it:',
        "joined": "Query: {text} is the question",
        "behind": "{text} The next sentence:",
        "plain": "Instruct: find it\nQuery: ",
    }
    texts = [*TEXTS[:4], "Query a", 'the"', "apple", " x"]
    for counted in ("exact", "nv-embed"):
        model = build_model(base, "mean", instruction_mask=counted, processor_kwargs={"padding_side": side})
        columns = counted == "nv-embed"
        lookup = PromptLookup(model.tokenizer.backend_tokenizer, prompts.values(), columns)
        for name, prompt in prompts.items():
            if columns and (side == "left" or name == "whole"):  # nothing is left out; its own parts are exact
                continue
            features = model.preprocess(texts, prompt=prompt)
            expected = features.get("instruction_mask", torch.zeros_like(features["input_ids"]))
            assert (name == "behind") == (not expected.any())
            found = lookup(features["input_ids"], features["attention_mask"])
            assert torch.equal(found, expected), (name, counted)
