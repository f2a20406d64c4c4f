"""What stands around a text: prompts and special tokens of every recipe, over tokenizers of every kind, in memory and
where plain sentence-transformers has loaded them again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_llm, train_tokenizer
from sentence_transformers import SentenceTransformer
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from st_llm_embed import LLMBackbone, build_model
from st_llm_embed.hub import seal
from st_llm_embed.recipes import RECIPES

TEXTS = ["a cat", "", "日本 dogs", "{text}", "a cat sat on the mat and " * 30]
PROMPTS = [
    "",
    "Query: ",
    "Query:\n",
    'Quote:"{text}" The next',
    "{text} The next:",
    "Q: {text}!",
    "Quote:{text}",
]
EOS = 2


def tokenizer(template: str = "$A", bos: str | None = "<s>", **settings) -> PreTrainedTokenizerFast:
    made = train_tokenizer(bos=False)
    made.bos_token = bos
    made.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    ids = {token: made.convert_tokens_to_ids(token) for token in ("<s>", "</s>", "<|end|>")}
    if template != "$A":
        made.backend_tokenizer.post_processor = Sequence(
            [ByteLevel(trim_offsets=False), TemplateProcessing(single=template, special_tokens=list(ids.items()))]
        )
    for name, value in settings.items():
        setattr(made, name, value)
    return made


# The tokenizer, and the special tokens that it puts around a text by itself.
KINDS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], list[str], list[str]]] = {
    "BOS": (lambda: tokenizer("<s> $A"), ["<s>"], []),
    "no BOS added": (tokenizer, [], []),
    "no BOS": (lambda: tokenizer(bos=None, pad_token="<unk>"), [], []),
    "BOS is EOS": (lambda: tokenizer("</s> $A", bos="</s>"), ["</s>"], []),
    "BOS is EOS, not added": (lambda: tokenizer(bos="</s>", pad_token="</s>"), [], []),
    "ends with EOS": (lambda: tokenizer("<s> $A </s>"), ["<s>"], ["</s>"]),
    "ends with another token": (lambda: tokenizer("$A <|end|>", bos=None, padding_side="left"), [], ["<|end|>"]),
}


def expected_ids(model: SentenceTransformer, kind: str, text: str, prompt: str, limit: int) -> list[int]:
    """The parts one by one; a part before the text that ends in a space, or has no ``{text}``, goes with the text."""
    tokenizer = model.tokenizer
    before, own_end = ([tokenizer.convert_tokens_to_ids(token) for token in part] for part in KINDS[kind][1:])
    add_eos = model[0].add_eos
    end = [tokenizer.eos_token_id] if add_eos and not own_end else own_end
    if model[0].tokenizer.get_added_vocab().get("<s8>"):
        end = []  # the released LLaRA code pools its own eight tokens, so they are the last

    def ids(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    prefix, template, suffix = prompt.partition("{text}")
    alone = bool(template and prefix and not prefix[-1].isspace())
    head = [*before, *(ids(prefix) if alone else [])]
    tail = [*ids(suffix), *end]
    body = ids(text if alone else prefix + text)
    if not head + body + tail:
        body = [tokenizer.eos_token_id]
    return [*head, *body[: limit - len(head) - len(tail)], *tail]


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_under_every_prompt_of_every_recipe(tmp_path, kind):
    llm = save_llm(tmp_path / "llm", tokenizer=KINDS[kind][0]())
    wrong = {}
    for recipe in RECIPES:
        model = build_model(llm, recipe, max_seq_length=48)
        for prompt in {*PROMPTS, *model.prompts.values()}:
            for side in ("left", "right"):
                model.tokenizer.padding_side = side
                features = model.preprocess(TEXTS, prompt=prompt)  # through the host, which swallows errors
                for text, ids, mask in zip(TEXTS, features["input_ids"], features["attention_mask"], strict=True):
                    found, expected = ids[mask.bool()].tolist(), expected_ids(model, kind, text, prompt, 48)
                    if found != expected:
                        wrong[recipe, prompt, side, text[:9]] = [*map(model.tokenizer.decode, (found, expected))]
    assert wrong == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_eos", [True, False])
def test_stock_sentence_transformers_gives_the_same_tokens(tmp_path, kind, add_eos):
    llm = save_llm(tmp_path / "llm", tokenizer=KINDS[kind][0]())
    model = build_model(llm, "last-token", add_eos=add_eos, max_seq_length=48)
    model.prompts = {"query": "Query: ", "document": "", "docs": "Instruct: find it\nQuery: "}
    model.save_pretrained(str(tmp_path / "sealed"))
    seal(tmp_path / "sealed")
    again = SentenceTransformer(str(tmp_path / "sealed"), trust_remote_code=True)
    # Without any special token an empty text would have no token there.
    has_specials = bool(add_eos or KINDS[kind][1] or KINDS[kind][2])
    assert (type(again[0]).__module__.startswith("sentence_transformers.")) == has_specials
    for prompt in model.prompts.values():
        for text in TEXTS:
            found, expected = (m.preprocess([text], prompt=prompt)["input_ids"].tolist() for m in (again, model))
            assert found == expected, (prompt, text)


def test_truncation_on_the_left_survives_and_spares_the_prompt(llm, tmp_path):
    model = build_model(llm, "last-token", max_seq_length=24)
    model.tokenizer.truncation_side = model.tokenizer.padding_side = "left"
    expected = model.preprocess(TEXTS, prompt="Query: ")["input_ids"]
    model.save_pretrained(str(tmp_path / "sealed"))
    seal(tmp_path / "sealed")
    again = SentenceTransformer(str(tmp_path / "sealed"), trust_remote_code=True)
    assert torch.equal(again.preprocess(TEXTS, prompt="Query: ")["input_ids"], expected)


@pytest.mark.parametrize("name", ["GPTNeoXTokenizer", "CodeLlamaTokenizer", "LlamaTokenizer", "GPT2Tokenizer"])
def test_tokenizer_classes_that_build_themselves_anew_keep_eos(tmp_path, name):
    byte_level = name.startswith("GPT")
    llm = Path(save_llm(tmp_path / "llm", tokenizer=train_tokenizer(byte_level)))
    config = json.loads((llm / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    (llm / "tokenizer_config.json").write_text(json.dumps(config))
    model = build_model(llm, "last-token")
    assert type(model.tokenizer).__name__ == name
    folder = tmp_path / "sealed"
    model.save_pretrained(str(folder))
    seal(folder)
    for _ in range(2):  # as it was published, and as a stranger saves it again
        again = SentenceTransformer(str(folder))
        found, expected = (m.preprocess(["a cat", "7 dogs"]) for m in (again, model))
        assert found["input_ids"].tolist() == expected["input_ids"].tolist()
        assert found["input_ids"][0, -1] == EOS and again.tokenizer.padding_side == model.tokenizer.padding_side
        folder = tmp_path / "again"
        again.save_pretrained(str(folder))


class Failing(LLMBackbone):
    """A backbone whose prompts meet an error that sentence-transformers takes for a module without prompts."""

    error: type[Exception] = TypeError

    def tokenize_part(self, part: str) -> list[int]:
        raise self.error(f"cannot tokenize {part!r}")


@pytest.mark.parametrize("error", [TypeError, AttributeError])
def test_no_error_becomes_another_text(llm, error):
    backbone = Failing(llm, attention="causal")
    backbone.error = error
    model = SentenceTransformer(modules=[backbone])
    with pytest.raises(ValueError, match="the prompt 'Quote:{text}' cannot be tokenized: cannot tokenize 'Quote:'"):
        model.preprocess(["a cat"], prompt="Quote:{text}")
    with pytest.raises(ValueError, match=r"has '\{text\}' more than once"):
        model.preprocess(["a cat"], prompt="{text} and {text}")


LENGTHS = [
    ({"max_seq_length": 24}, {}, 24),
    ({"query_length": 24, "document_length": 40}, {"task": "query"}, 24),
    ({"query_length": 24, "document_length": 40}, {"task": "document"}, 40),
    ({}, {"max_length": 24}, 24),
    ({}, {"processing_kwargs": {"text": {"max_length": 24}}}, 24),
    ({"processing_kwargs": {"text": {"max_length": 24}}}, {}, 24),
    ({"processing_kwargs": {"common": {"max_length": 24, "pad_to_multiple_of": 12}}}, {}, 24),
    ({"max_seq_length": 24, "processing_kwargs": {"text": {"padding": "max_length"}}}, {}, 24),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompt", PROMPTS[1:])
def test_lengths_hold_wherever_they_are_set(llm, side, prompt):
    """No more tokens than that, and what is around the text is whole."""
    before, _, after = prompt.partition("{text}")
    for settings, call, limit in LENGTHS:
        backbone = LLMBackbone(llm, attention="causal", probe=False, **settings)
        backbone.tokenizer.truncation_side = side
        features = backbone.preprocess([TEXTS[-1], "a"], prompt=prompt, **call)
        assert features["input_ids"].shape == features["attention_mask"].shape == (2, limit)
        rows = zip(features["input_ids"], features["attention_mask"].bool(), strict=True)
        long, short = (backbone.tokenizer.decode(ids[mask]) for ids, mask in rows)
        assert features["attention_mask"][0].all() and short == f"<s>{before}a{after}</s>"
        assert long.startswith(f"<s>{before}") and long.endswith(f"{after}</s>")
        kept = long.removeprefix(f"<s>{before}").removesuffix(f"{after}</s>").strip()
        assert kept and (TEXTS[-1].strip().endswith(kept) if side == "left" else TEXTS[-1].startswith(kept))


def test_a_batch_is_as_wide_as_asked_with_the_prompt_in_it(llm):
    for side in ("left", "right"):
        backbone = LLMBackbone(llm, processing_kwargs={"text": {"pad_to_multiple_of": 16}}, max_seq_length=96)
        backbone.tokenizer.padding_side = side
        features = backbone.preprocess(["a cat", ""], prompt='Quote:"{text}" The next')
        alone = LLMBackbone(llm).preprocess(["a cat"], prompt='Quote:"{text}" The next')["input_ids"]
        assert features["input_ids"].shape == features["instruction_mask"].shape == (2, 16)
        assert torch.equal(features["input_ids"][0][features["attention_mask"][0].bool()], alone[0])
