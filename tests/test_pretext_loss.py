"""PretextLoss: one pass equals two, and its parts equal the formula."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import save_llm
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn
from transformers import AutoModelForCausalLM

from examples.architectures.survey import tiny_config
from st_llm_embed import LLMBackbone, PretextLoss, PromptTokenPooling, build_model
from st_llm_embed.hub import seal
from st_llm_embed.losses.chunked_cross_entropy import ChunkedCrossEntropy
from st_llm_embed.losses.pretext import bag_of_words_loss
from st_llm_embed.recipes import EBAE_PROMPT, EBAR_PROMPT, RELEASE_EBAE_PROMPT, RELEASE_EBAR_PROMPT

TEXT = ["the cat sat on the mat", "dogs", "seven dogs were barking at the moon"]
NEXT = ["the quick brown fox", "", "sum of all numbers"]


def columns(model: SentenceTransformer) -> list[dict[str, torch.Tensor]]:
    return [model.preprocess(TEXT), model.preprocess(NEXT)]


def real_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[list[int]]:
    return [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_one_pass_equals_two_prompted_passes(llm, side, num_tokens):
    model = build_model(llm, "llara", num_tokens=num_tokens).eval()
    model.tokenizer.padding_side = side
    loss = PretextLoss(model, num_tokens=num_tokens)
    features = model.preprocess(TEXT)
    ids = real_tokens(features["input_ids"], features["attention_mask"])
    joint = loss.join_prompts(ids, torch.device("cpu"))
    rows = torch.arange(len(TEXT)).unsqueeze(1)
    with torch.no_grad():
        hidden = model[0](joint.features)["token_embeddings"]
        for prompt, positions in ((EBAE_PROMPT, joint.self_positions), (EBAR_PROMPT, joint.next_positions)):
            alone = model.encode(TEXT, prompt=prompt, convert_to_tensor=True)
            pooled = nn.functional.normalize(hidden[rows, positions].mean(dim=1), dim=-1)
            torch.testing.assert_close(pooled, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_the_joint_mask_and_positions_by_the_rules(llm, attention):
    loss = PretextLoss(build_model(llm, "llara", attention=attention))
    text = [[1, 5, 6, 7, 2], [1, 8, 2]]
    joint = loss.join_prompts(text, torch.device("cpu"))
    for row, ids in enumerate(text):
        length, self_length = len(ids) - 1, len(loss.self_ids)
        blocks = ["text"] * length + ["self"] * self_length + ["next"] * len(loss.next_ids)
        expected = ids[:-1] + loss.self_ids + loss.next_ids
        assert joint.features["input_ids"][row, : len(expected)].tolist() == expected
        assert joint.features["attention_mask"][row].sum() == len(expected)
        positions = [i - (self_length if block == "next" else 0) for i, block in enumerate(blocks)]
        assert joint.features["position_ids"][row, : len(expected)].tolist() == positions
        mask = joint.features["structured_mask"][row]
        for q, query in enumerate(blocks):
            for k, key in enumerate(blocks):
                allowed = (key == "text" or key == query) and (attention == "bidirectional" or k <= q)
                assert mask[q, k] == allowed, (q, k)
        assert not mask[: len(expected), len(expected) :].any()
        assert joint.self_positions[row].tolist() == [length + self_length - 1]
        assert joint.next_positions[row].tolist() == [len(expected) - 1]
    assert joint.features["structured_mask"].any(dim=-1).all()  # no row without a key, padding's neither


def test_the_parts_equal_the_formula(llm):
    model = build_model(llm, "llara").eval()
    loss = PretextLoss(model)
    with torch.no_grad():
        parts = loss(columns(model))
        weight = model[0].model.get_input_embeddings().weight
        for name, prompt, targets in (("ebae", EBAE_PROMPT, TEXT), ("ebar", EBAR_PROMPT, NEXT)):
            terms = []
            for text, target in zip(TEXT, targets, strict=True):
                state = model[0](model.preprocess([text], prompt=prompt))["token_embeddings"][0, -1]
                log_probabilities = torch.log_softmax(weight @ state, dim=0)
                words = set(model.tokenizer(target, add_special_tokens=False)["input_ids"])
                if words:
                    terms.append(-sum(log_probabilities[word] for word in words) / len(words))
            assert len(terms) == (3 if name == "ebae" else 2)
            torch.testing.assert_close(parts[name], torch.stack(terms).mean(), atol=1e-5, rtol=1e-5)


def test_a_target_of_its_own_takes_the_place_of_the_text(llm):
    """EBAE then predicts those words, and nothing else changes; rows of special tokens only do not count."""
    model = build_model(llm, "llara").eval()
    loss = PretextLoss(model)
    special = model.tokenizer.bos_token + model.tokenizer.eos_token
    target = ["cat mat", special, "moon"]
    with torch.no_grad():
        plain = loss(columns(model))
        given = loss([*columns(model), model.preprocess(target)])
        alone = loss([model.preprocess([text]) for text in (TEXT[0], "", "cat mat")])
        last = loss([model.preprocess([text]) for text in (TEXT[2], "", "moon")])
    torch.testing.assert_close(given["ebar"], plain["ebar"])
    torch.testing.assert_close(given["ebae"], (alone["ebae"] + last["ebae"]) / 2, atol=1e-5, rtol=1e-5)
    assert alone["ebar"] == 0


def test_a_published_model_can_be_adapted_further(llm, tmp_path):
    """Its backbone is a copy of the class, from its own folder."""
    model = build_model(llm, "llara").eval()
    model.save_pretrained(str(tmp_path / "model"))
    seal(tmp_path / "model")
    again = SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True).eval()
    assert not isinstance(again[0], LLMBackbone)
    expected = PretextLoss(model)(columns(model))
    for used in (again, model, again, model):  # in turn: two copies of the mask's code in one process
        torch.testing.assert_close(PretextLoss(used)(columns(used)), expected)


def test_a_model_without_a_longest_text(llm):
    model = build_model(llm, "llara").eval()
    limited = PretextLoss(model)(columns(model))
    loss = PretextLoss(model)
    loss.max_seq_length = None
    torch.testing.assert_close(loss(columns(model)), limited)


def test_the_papers_form_sums_over_a_bag(llm):
    model = build_model(llm, "llara").eval()
    with torch.no_grad():
        mean, paper = PretextLoss(model)(columns(model)[:2]), PretextLoss(model, form="paper")(columns(model)[:2])
        single = [model.preprocess(TEXT[:1]), model.preprocess(NEXT[:1])]
        words = set(model.tokenizer(TEXT[0], add_special_tokens=False)["input_ids"])
        one, summed = PretextLoss(model)(single), PretextLoss(model, form="paper")(single)
    torch.testing.assert_close(summed["ebae"], one["ebae"] * len(words))
    assert paper["ebar"] > mean["ebar"]


@pytest.mark.parametrize("case", ["joint", "single"])
def test_equals_the_released_code(shared, case):
    """Losses, positions, mask, hidden states and gradients, on the ids that the original's own tokenizing made."""
    folder = shared / "fixtures" / "llara_tiny"
    stored = {k.removeprefix(f"{case}."): v for k, v in load_file(folder / "pretrain_expected.safetensors").items()}
    whole = AutoModelForCausalLM.from_pretrained(folder)
    backbone = LLMBackbone(str(folder), attention="causal", add_eos=False)
    model = SentenceTransformer(modules=[backbone, Pooling(64, "lasttoken")]).eval()
    loss = PretextLoss(
        model,
        RELEASE_EBAE_PROMPT,
        RELEASE_EBAR_PROMPT,
        num_tokens=8,
        lm_head=whole.get_output_embeddings(),
        form="release",
    )
    expected = json.loads((folder / "pretrain_expected.json").read_text())
    assert loss.self_ids == expected["summarize_suffix_ids"] and loss.next_ids == expected["predict_suffix_ids"]
    texts, starts = [], []
    for ids, mask, labels in zip(stored["input_ids"], stored["attention_mask"], stored["labels"], strict=True):
        row = ids[mask.bool()].tolist()
        texts.append(row[: -len(loss.self_ids) - len(loss.next_ids)])
        starts.append(len(texts[-1]) - int((labels != -100).sum()))
    joint = loss.join_prompts(texts, torch.device("cpu"))
    hidden = model[0](joint.features)["token_embeddings"]
    real = joint.features["attention_mask"].bool()
    torch.testing.assert_close(hidden[real], stored["last_hidden_state_packed"], atol=5e-5, rtol=0)
    for row, (theirs, mask) in enumerate(zip(stored["mask_allowed_4d"], stored["attention_mask"], strict=True)):
        length = int(mask.sum())  # theirs is padded on the left
        assert torch.equal(
            joint.features["structured_mask"][row, :length, :length], theirs[0, -length:, -length:].bool()
        )
        positions = stored["position_ids"][0, -length:]
        assert torch.equal(joint.features["position_ids"][row, :length], positions - positions[0])
    rows = torch.arange(len(texts)).unsqueeze(1)
    carriers = [hidden[rows, joint.self_positions], hidden[rows, joint.next_positions]]
    torch.testing.assert_close(carriers[0], stored["summarize_hidden"], atol=5e-5, rtol=0)
    torch.testing.assert_close(carriers[1], stored["predict_hidden"], atol=5e-5, rtol=0)
    targets = [[row.tolist() for row in stored[f"output_{name}_ids"]] for name in ("summarize", "predict")]
    parts = loss.compute_loss_from_embeddings(carriers, targets)
    parts["ar"] = loss._autoregressive_loss(hidden, joint.texts, starts)
    torch.testing.assert_close(2 * parts["ebae"], stored["bow_summarize_loss"][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(2 * parts["ebar"], stored["bow_predict_loss"][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(parts["ar"], stored["ar_loss"][0], atol=1e-5, rtol=0)
    total = sum(parts.values())
    torch.testing.assert_close(total, stored["loss"][0], atol=1e-5, rtol=0)
    if case == "joint":
        total.backward()
        gradients = {f"model.{name}": p.grad for name, p in backbone.model.named_parameters()}
        gradients["lm_head.weight"] = loss.lm_head.weight.grad
        theirs = {name.removeprefix("grad."): value for name, value in stored.items() if name.startswith("grad.")}
        assert set(gradients) == set(theirs) and len(theirs) == 21
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, theirs[name], atol=2e-6, rtol=0)


def test_the_released_codes_representations(shared):
    """Token ids, masks, the last eight hidden states and the embeddings of its fine-tuning, and the scores."""
    folder = shared / "fixtures" / "llara_tiny"
    expected = json.loads((folder / "finetune_expected.json").read_text())
    stored = load_file(folder / "finetune_expected.safetensors")
    backbone = LLMBackbone(str(folder), attention="causal", add_eos=False)
    model = SentenceTransformer(modules=[backbone, PromptTokenPooling(64, num_tokens=8), Normalize()]).eval()
    model.tokenizer.padding_side = "left"
    queries = [row["query"] for row in expected["rows"]]
    passages = [text for row in expected["rows"] for text in (*row["pos"], *row["neg"])]
    vectors = {}
    for name, texts, prompt in (("query", queries, RELEASE_EBAR_PROMPT), ("passage", passages, RELEASE_EBAE_PROMPT)):
        model.max_seq_length = expected[f"{name}_max_len"]
        features = model.preprocess(texts, prompt=prompt)
        ours = real_tokens(features["input_ids"], features["attention_mask"])
        # Theirs are padded to a multiple of 8.
        assert ours == real_tokens(stored[f"{name}.input_ids"], stored[f"{name}.attention_mask"])
        with torch.no_grad():
            hidden = backbone(features)["token_embeddings"][:, -8:]
        torch.testing.assert_close(hidden, stored[f"{name}.last8_hidden"], atol=5e-5, rtol=0)
        vectors[name] = model.encode(texts, prompt=prompt, convert_to_tensor=True)
        torch.testing.assert_close(vectors[name], stored[f"{name}.reps"], atol=2e-6, rtol=0)
    scores = vectors["query"] @ vectors["passage"].T / expected["temperature"]
    torch.testing.assert_close(scores, stored["scores"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_release_variant_from_build_model(llm, side):
    """Joint equals separate; the quote before the text is neither predicted nor in a bag; AR equals plain logits."""
    model = build_model(llm, "llara-release").eval()
    model.tokenizer.padding_side = side
    loss = PretextLoss(model, RELEASE_EBAE_PROMPT, RELEASE_EBAR_PROMPT, num_tokens=8, form="release")
    assert model.tokenizer.convert_ids_to_tokens(loss.self_ids)[-8:] == [f"<s{i}>" for i in range(1, 9)]
    with pytest.raises(ValueError, match="the column 'text' does not. Pass"):
        loss(columns(model))
    features = model.preprocess(TEXT, prompt='"{text}')
    ids = real_tokens(features["input_ids"], features["attention_mask"])
    joint = loss.join_prompts(ids, torch.device("cpu"))
    rows = torch.arange(len(TEXT)).unsqueeze(1)
    with torch.no_grad():
        parts = loss([features, model.preprocess(NEXT)])
        hidden = model[0](joint.features)["token_embeddings"]
        for prompt, positions in (
            (RELEASE_EBAE_PROMPT, joint.self_positions),
            (RELEASE_EBAR_PROMPT, joint.next_positions),
        ):
            pooled = nn.functional.normalize(hidden[rows, positions].mean(dim=1), dim=-1)
            alone = model.encode(TEXT, prompt=prompt, convert_to_tensor=True)
            torch.testing.assert_close(pooled, alone, atol=1e-5, rtol=0)
        weight = model[0].model.get_input_embeddings().weight
        terms = []
        for row, text in enumerate(ids):
            logits = hidden[row, : len(text)] @ weight.T
            terms += [-logits[i - 1].log_softmax(-1)[text[i]] for i in range(2, len(text))]  # after BOS and the quote
    torch.testing.assert_close(parts["ar"], torch.stack(terms).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [(), ("weight",), ("states", "weight", "bias")])
def test_the_chunked_cross_entropy_equals_the_plain_one(frozen):
    given = {"states": torch.randn(300, 8), "weight": torch.randn(50, 8), "bias": torch.randn(50)}
    targets = torch.randint(0, 50, (300,))
    values, gradients = [], []
    for chunked in (True, False):
        tensors = {name: value.clone().requires_grad_(name not in frozen) for name, value in given.items()}
        if chunked:
            value = ChunkedCrossEntropy.apply(*tensors.values(), targets)
        else:
            logits = nn.functional.linear(*tensors.values())
            value = nn.functional.cross_entropy(logits, targets, reduction="sum")
        if len(frozen) < 3:
            (value / 7).backward()
        values.append(value.detach())
        gradients.append([tensor.grad for tensor in tensors.values() if tensor.requires_grad])
    torch.testing.assert_close(values[0], values[1], atol=1e-4, rtol=1e-6)
    assert len(gradients[0]) == 3 - len(frozen)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-5)


def test_bags_without_words_do_not_count():
    logits = torch.randn(3, 7, requires_grad=True)
    torch.testing.assert_close(bag_of_words_loss(logits, [[], [2], []]), -logits.log_softmax(-1)[1, 2])
    nothing = bag_of_words_loss(logits, [[], [], []])
    nothing.backward()
    assert nothing == 0 and logits.grad is not None


def test_long_texts_are_cut_and_suffixes_are_not(llm):
    model = build_model(llm, "llara", max_seq_length=24)
    loss = PretextLoss(model)
    long = model.preprocess(["a " * 200])["input_ids"].tolist()
    ids = loss.join_prompts(long, torch.device("cpu")).features["input_ids"][0].tolist()
    assert ids[-len(loss.next_ids) :] == loss.next_ids
    longest = max(len(loss.self_ids), len(loss.next_ids))
    assert len(ids) == 24 - longest + len(loss.self_ids) + len(loss.next_ids)


@pytest.mark.parametrize("recipe", ["nv-embed", "llara"])
def test_it_trains_the_llm(llm, recipe):
    model = build_model(llm, recipe).train()
    loss = PretextLoss(model)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=3e-3)
    history = []
    for _ in range(20):
        parts = loss(columns(model))
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        history.append({name: part.item() for name, part in parts.items()})
    assert all(history[-1][name] < 0.7 * history[0][name] for name in ("ebae", "ebar"))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model[0].model.parameters())


def test_an_untied_lm_head_is_used_when_given_and_demanded_when_not(tmp_path):
    path = save_llm(tmp_path, tie_word_embeddings=False)
    model = build_model(path, "llara").eval()
    with pytest.raises(ValueError, match="Pass lm_head=AutoModelForCausalLM"):
        PretextLoss(model)
    head = AutoModelForCausalLM.from_pretrained(path).get_output_embeddings()
    loss = PretextLoss(model, lm_head=head)
    state = torch.randn(2, 1, 32)
    expected = bag_of_words_loss(head(state[:, 0]), [[5], [6]])
    parts = loss.compute_loss_from_embeddings([state, state], [[[5], [6]], [[5], [6]]])
    torch.testing.assert_close(parts["ebae"], expected)


def test_refuses_models_prompts_and_columns_that_do_not_fit(llm):
    stock = Transformer(llm)
    with pytest.raises(ValueError, match="needs an LLMBackbone.*not Transformer"):
        PretextLoss(SentenceTransformer(modules=[stock, Pooling(32)]))
    model = SentenceTransformer(modules=[LLMBackbone(llm, attention="causal"), Pooling(32, "lasttoken")])
    with pytest.raises(ValueError, match="must contain '{text}'"):
        PretextLoss(model, self_prompt="The original sentence:")
    with pytest.raises(ValueError, match="begin differently: 'Text: ' and ''"):
        PretextLoss(model, self_prompt="Text: {text} The original sentence:")
    with pytest.raises(ValueError, match="form='released' is unknown. Valid forms: mean, paper, release"):
        PretextLoss(model, form="released")
    with pytest.raises(ValueError, match="it needs attention='causal'"):
        PretextLoss(build_model(llm, "mean"), form="release")
    with pytest.raises(ValueError, match=r"num_tokens=99 is outside 1\.\."):
        PretextLoss(model, num_tokens=99)
    with pytest.raises(ValueError, match="takes the columns 'text', 'next' and perhaps 'target', got 1"):
        PretextLoss(model)(columns(model)[:1])
    with pytest.raises(ValueError, match="The prompt part '' has no tokens"):
        PretextLoss(model, next_prompt="{text}")
    model.max_seq_length = 4
    with pytest.raises(ValueError, match=r"leaves no room for text within max_seq_length=4. Raise max_seq_length"):
        PretextLoss(model)


@pytest.mark.parametrize("name", ["jamba", "bloom"])
def test_an_llm_that_cannot_have_both_prompts_in_a_row_is_refused_at_once(tmp_path, name):
    """A recurrence would carry EBAE's prompt into EBAR's embedding, without a word."""
    config = tiny_config(name)
    config.vocab_size = 710
    base = save_llm(tmp_path / name, config=config)
    with pytest.raises(ValueError, match=f"'{name}' .* cannot share a row"):
        PretextLoss(build_model(base, "llara"), lm_head=torch.nn.Linear(32, 710))
