"""LLMBackbone: the mask is what it says, EOS stays, and the instruction mask is exact."""

from __future__ import annotations

import pytest
import torch
from conftest import TEXTS, save_llm, train_tokenizer

from st_llm_embed import LLMBackbone


def token_embeddings(backbone: LLMBackbone, texts: list[str], **kwargs) -> list[torch.Tensor]:
    """Each text's ``(length, dim)`` hidden states, padding dropped."""
    with torch.no_grad():
        features = backbone(backbone.preprocess(texts, **kwargs))
    return [h[m.bool()] for h, m in zip(features["token_embeddings"], features["attention_mask"], strict=True)]


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_first_token_sees_the_last_only_when_bidirectional(llm, attention, implementation):
    backbone = LLMBackbone(llm, attention=attention, model_kwargs={"attn_implementation": implementation}).eval()
    assert backbone.model.config._attn_implementation == implementation
    for texts in (["the cat sat on"], ["the cat sat on", "seven dogs were barking at the moon"]):  # alone, and padded
        before = token_embeddings(backbone, texts)[0]
        after = token_embeddings(backbone, ["the cat sat dog", *texts[1:]])[0]
        assert torch.equal(before[0], after[0]) == (attention == "causal")
        assert not torch.equal(before[-2], after[-2])


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_alone_equals_the_text_in_a_padded_batch(llm, attention, side):
    backbone = LLMBackbone(llm, attention=attention).eval()
    backbone.tokenizer.padding_side = side
    for text, in_batch in zip(TEXTS, token_embeddings(backbone, TEXTS, prompt="Query: "), strict=True):
        alone = token_embeddings(backbone, [text], prompt="Query: ")[0]
        torch.testing.assert_close(in_batch, alone, atol=1e-5, rtol=0)


def test_the_mode_survives_saving(llm, tmp_path):
    LLMBackbone(llm, attention="bidirectional").save(str(tmp_path))
    again = LLMBackbone.load(str(tmp_path))
    assert again.attention == "bidirectional" and again.config.is_causal is False
    assert again.tokenizer("a")["input_ids"].count(again.tokenizer.eos_token_id) == 1


def test_every_choice_survives_saving(llm, tmp_path):
    chosen = {
        "attention": "causal",
        "window": "full",
        "add_eos": False,
        "instruction_mask": "nv-embed",
        "probe": False,
    }
    LLMBackbone(llm, **chosen).save(str(tmp_path))
    again = LLMBackbone.load(str(tmp_path))
    assert {name: getattr(again, name) for name in chosen} == chosen


def test_refuses_unknown_arguments_with_the_valid_ones(llm):
    with pytest.raises(ValueError, match="attention='both' is unknown. Valid modes: bidirectional, causal"):
        LLMBackbone(llm, attention="both")
    with pytest.raises(ValueError, match="window='half' is unknown. Valid values: full, keep"):
        LLMBackbone(llm, window="half")
    with pytest.raises(ValueError, match="instruction_mask='released' is unknown. Valid values: exact, nv-embed"):
        LLMBackbone(llm, instruction_mask="released")
    for depth in (0, 3):
        with pytest.raises(ValueError, match=rf"num_layers={depth} is outside 1\.\.2"):
            LLMBackbone(llm, num_layers=depth)


def test_num_layers_keeps_the_first_layers_and_the_norm(llm, tmp_path):
    whole, cut = LLMBackbone(llm, attention="causal").eval(), LLMBackbone(llm, attention="causal", num_layers=1).eval()
    features = whole.preprocess(["the cat sat"])
    with torch.no_grad():
        states = whole.model(features["input_ids"], output_hidden_states=True).hidden_states
        expected = whole.model.norm(states[1])
        torch.testing.assert_close(cut(dict(features))["token_embeddings"], expected)
    cut.save(str(tmp_path))
    assert LLMBackbone.load(str(tmp_path)).config.num_hidden_layers == 1


@pytest.mark.parametrize("byte_level", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_every_text_ends_in_one_eos_also_when_truncated(tmp_path, byte_level, bos):
    path = save_llm(tmp_path, tokenizer=train_tokenizer(byte_level, bos))
    backbone = LLMBackbone(path, max_seq_length=16)
    features = backbone.preprocess(TEXTS)
    assert features["input_ids"].shape[1] == 16
    eos = backbone.tokenizer.eos_token_id
    for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True):
        real = ids[mask.bool()].tolist()
        assert real[-1] == eos and real.count(eos) == 1 and (real[0] == 1) == bos


@pytest.mark.parametrize("byte_level", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompt", ["Instruct: find it\nQuery: ", "Query:", "Query:\n", "find x"])
def test_the_instruction_mask_leaves_exactly_the_text(tmp_path, byte_level, side, prompt):
    backbone = LLMBackbone(save_llm(tmp_path, tokenizer=train_tokenizer(byte_level)))
    tokenizer = backbone.tokenizer
    tokenizer.padding_side = side
    texts = ["are cats", "", "日本", "\n lines", " the moon", "x"]
    features = backbone.preprocess(texts, prompt=prompt)
    for text, ids, real, masked in zip(
        texts, features["input_ids"], features["attention_mask"], features["instruction_mask"], strict=True
    ):
        assert not (masked & (1 - real)).any()
        kept = ids[(real - masked).bool()].tolist()
        assert kept[-1] == tokenizer.eos_token_id
        # Oracle: the longest run of final tokens whose characters reach into the text.
        encoded = tokenizer(prompt + text, return_offsets_mapping=True)
        ends = [end for start, end in encoded["offset_mapping"] if end > start]
        assert len(kept) - 1 == sum(end > len(prompt) for end in ends)
        # And without offsets: what is kept reads as the text, up to the space that a token may share with the prompt.
        assert tokenizer.decode(kept[:-1]).strip() in (text.strip(), (prompt.split()[-1] + text).strip())


@pytest.mark.parametrize("prompt", ["Instruct: find it\nQuery: ", "Query:"])
def test_the_released_nv_embeds_count(tmp_path, prompt):
    """As many columns as the prompt has tokens without BOS; none where padding is on the left."""
    path = save_llm(tmp_path, tokenizer=train_tokenizer(byte_level=False))
    backbone = LLMBackbone(path, instruction_mask="nv-embed")
    count = len(backbone.tokenizer.tokenize(prompt))
    features = backbone.preprocess(["are cats", "", "日本"], prompt=prompt)
    seq = features["input_ids"].shape[1]
    assert features["instruction_mask"].tolist() == [[1] * count + [0] * (seq - count)] * 3
    backbone.tokenizer.padding_side = "left"
    assert not backbone.preprocess(["are cats", "", "日本"], prompt=prompt)["instruction_mask"].any()


def test_a_prompt_that_leaves_no_room_is_refused(llm):
    backbone = LLMBackbone(llm, max_seq_length=12)
    with pytest.raises(
        ValueError, match="takes .* tokens with BOS and EOS, which leaves no room .* max_seq_length=12"
    ):
        backbone.preprocess(["a cat"], prompt="Instruct: Given a question, retrieve passages that answer it\nQuery: ")
    backbone.max_seq_length = 64
    assert backbone.preprocess(["a cat " * 99], prompt="Query: ")["input_ids"].shape[1] == 64
    with pytest.raises(ValueError, match="max_seq_length=4"):
        backbone.preprocess(["a cat"], prompt="Query: ", max_length=4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_same_batch_may_be_embedded_twice(llm, side):
    """As the gradient-cached losses do: the second time counts, and what came in is as it was."""
    backbone = LLMBackbone(llm).eval()
    backbone.tokenizer.padding_side = side
    features = backbone.preprocess(TEXTS, prompt="Query: ")
    given = {key: value.clone() for key, value in features.items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        first = backbone(features)["token_embeddings"]
        backbone.model.get_input_embeddings().weight.mul_(-1)
        second = backbone(features)["token_embeddings"]
    assert (first - second).abs().max() > 1e-3 and features["token_embeddings"] is second
    assert "position_ids" not in features and all(torch.equal(features[key], value) for key, value in given.items())


def test_without_a_prompt_there_is_no_instruction_mask(llm):
    assert "instruction_mask" not in LLMBackbone(llm).preprocess(["a"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("add_eos", [True, False])
def test_a_suffix_follows_the_text_and_truncation_spares_it(llm, side, add_eos):
    backbone = LLMBackbone(llm, add_eos=add_eos, max_seq_length=40)
    tokenizer = backbone.tokenizer
    tokenizer.padding_side = side
    suffix = tokenizer(" The next sentence:", add_special_tokens=False)["input_ids"]
    features = backbone.preprocess(TEXTS, prompt="Text: {text} The next sentence:")
    assert features["input_ids"].shape[1] == 40
    rows = zip(TEXTS, features["input_ids"], features["attention_mask"], features["instruction_mask"], strict=True)
    for text, ids, real, masked in rows:
        body = tokenizer("Text: " + text, add_special_tokens=False)["input_ids"]
        tail = [*suffix, *([tokenizer.eos_token_id] if add_eos else [])]
        assert ids[real.bool()].tolist() == [1, *body[: 40 - 1 - len(tail)], *tail]
        assert tokenizer.decode(ids[masked.bool()]).strip() == "<s>Text:"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_a_templates_parts_are_tokens_of_their_own(tmp_path, side, bos, add_eos):
    path = save_llm(tmp_path, tokenizer=train_tokenizer(byte_level=False, bos=bos))
    backbone = LLMBackbone(path, add_eos=add_eos, max_seq_length=32)
    tokenizer = backbone.tokenizer
    tokenizer.padding_side = side

    def alone(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    features = backbone.preprocess(TEXTS, prompt='"{text}", in one word')
    rows = zip(TEXTS, features["input_ids"], features["attention_mask"], features["instruction_mask"], strict=True)
    for text, ids, real, masked in rows:
        head = [*([1] if bos else []), *alone('"')]
        tail = [*alone('", in one word'), *([2] if add_eos else [])]
        assert ids[real.bool()].tolist() == [*head, *alone(text)[: 32 - len(head) - len(tail)], *tail]
        assert ids[masked.bool()].tolist() == head


def test_a_suffix_that_leaves_no_room_or_has_no_tokens_is_refused(llm):
    backbone = LLMBackbone(llm, max_seq_length=8)
    with pytest.raises(ValueError, match="leaves no room for text within max_seq_length=8"):
        backbone.preprocess(["a"], prompt="{text}" + " The next sentence:" * 3)
    with pytest.raises(ValueError, match="has no tokens"):
        backbone.tokenize_part("")


def test_an_empty_text_has_a_token_even_without_special_tokens(tmp_path):
    backbone = LLMBackbone(save_llm(tmp_path, tokenizer=train_tokenizer(bos=False)), add_eos=False)
    features = backbone.preprocess(["", "a cat", " "])
    assert (features["attention_mask"].sum(dim=1) >= 1).all()
    for prompt in ("about: {text} in short", "{text} in short"):  # in a batch of its own too
        alone, among = (backbone.preprocess(texts, prompt=prompt) for texts in ([""], ["", "a cat"]))
        rows = [features["input_ids"][0][features["attention_mask"][0].bool()].tolist() for features in (alone, among)]
        assert rows[0] == rows[1] != []


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    path = save_llm(tmp_path)
    tokenizer = train_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match="has no EOS token. Pass processor_kwargs"):
        LLMBackbone(path)
