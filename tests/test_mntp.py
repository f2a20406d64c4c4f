"""Masked next-token prediction: loss and gradients of the literal formula, masks, a run that goes on, a merged LLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import save_llm, train_tokenizer
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from examples.architectures.survey import tiny_config
from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, MNTPLoss, build_model
from st_llm_embed.cli import main
from st_llm_embed.data import consecutive_texts
from st_llm_embed.losses import chunked_cross_entropy
from st_llm_embed.losses.chunked_cross_entropy import ChunkedCrossEntropy
from st_llm_embed.losses.token_masking import mask_tokens
from st_llm_embed.training import train_stages
from st_llm_embed.weights import average_checkpoints

TEXTS = ["the cat sat on the mat while seven dogs were barking at the moon", "dogs", "", "a quick brown fox jumped"]


def causal_lm(folder: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The plain LLM with its LM head, without its causal mask."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    whole.config.is_causal = False
    return whole


def literal(whole: nn.Module, features: dict[str, Tensor], masked: Tensor, chosen: Tensor) -> Tensor:
    """All logits at once, then token by token: each masked one from the logits one place before it."""
    real = features["attention_mask"]
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    logits = whole(input_ids=masked, attention_mask=real, position_ids=positions, use_cache=False).logits
    terms = [
        F.cross_entropy(logits[row, column - 1], features["input_ids"][row, column])
        for row, column in chosen.nonzero().tolist()
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loss_and_gradients_are_those_of_the_literal_formula(tmp_path, tied, side, dtype):
    folder = save_llm(tmp_path, tie_word_embeddings=tied)
    model = build_model(folder, "mean", model_kwargs={"dtype": dtype}).eval()
    model.tokenizer.padding_side = side
    head = None if tied else causal_lm(folder, dtype).get_output_embeddings()
    loss = MNTPLoss(model, mask_share=0.4, lm_head=head)
    features = model.preprocess(TEXTS)
    masked = loss.mask(features)
    assert 8 < masked.chosen.sum() < 20 and (masked.input_ids != features["input_ids"]).any()
    value = loss([features])
    value.backward()
    whole = causal_lm(folder, dtype)
    expected = literal(whole, features, *masked)
    expected.backward()
    assert 3 < expected < 30
    exact = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(value, expected, **exact)
    theirs = {name: weight.grad for name, weight in whole.named_parameters()}
    ours = {f"model.{name}": weight.grad for name, weight in model[0].model.named_parameters()}
    ours |= {} if tied else {"lm_head.weight": head.weight.grad}
    assert ours.keys() == theirs.keys() and all(gradient.abs().sum() > 0 for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, **exact)


# What an LLM's logits are besides W h: scaled, kept below a cap, with a bias.
LOGITS = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 512},  # all of it, as the backbone opens it
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "minicpm3": {"dim_model_base": 8},  # of a width of 32
    "hyperclovax": {"logits_scaling": 0.25},
    "gpt2": {},
    "gptj": {},
    "phi": {},
    "qwen3_moe": {},
}


@pytest.mark.parametrize("model_type", [name for name in LOGITS if name in CONFIG_MAPPING])
def test_the_logits_are_the_llms_own(tmp_path, model_type):
    config = tiny_config(model_type)
    config.vocab_size = len(train_tokenizer())
    for name, value in LOGITS[model_type].items():
        assert hasattr(config, name)
        setattr(config, name, value)
    folder = save_llm(tmp_path, config)
    model = build_model(folder, "mean").eval()
    loss = MNTPLoss(model, mask_share=0.5, lm_head=causal_lm(folder).get_output_embeddings())
    features = model.preprocess(TEXTS)
    with torch.no_grad():
        expected = literal(causal_lm(folder), features, *loss.mask(features))
        plain = loss([features])
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_chunks_of_any_size_give_the_same(monkeypatch, softcap):
    given = {"states": torch.randn(30, 8), "weight": torch.randn(50, 8), "bias": torch.randn(50)}
    targets = torch.randint(0, 50, (30,))
    found = []
    for chunk in (None, 7, 1000):  # None: without chunks, by torch alone
        tensors = {name: value.double().requires_grad_() for name, value in given.items()}
        if chunk is None:
            logits = F.linear(*tensors.values())
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            value = F.cross_entropy(logits, targets, reduction="sum")
        else:
            monkeypatch.setattr(chunked_cross_entropy, "CHUNK", chunk)
            value = ChunkedCrossEntropy.apply(*tensors.values(), targets, softcap)
        (value / 7).backward()
        found.append([value.detach(), *(tensor.grad for tensor in tensors.values())])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize("count", [1, 2, 9, 400])
@pytest.mark.parametrize("share", [0.15, 0.8, 1.0])
def test_the_share_of_each_row_is_masked(count, share):
    ids = torch.arange(10, 10 + count).expand(3, -1)
    masked, chosen = mask_tokens(
        ids, torch.ones_like(ids, dtype=torch.bool), share=share, mask_id=3, words=None, draw=5
    )
    assert (chosen.sum(dim=1) == max(1, round(share * count))).all()
    assert torch.equal(masked, ids.masked_fill(chosen, 3))
    nothing = mask_tokens(ids, torch.zeros_like(ids, dtype=torch.bool), share=share, mask_id=3, words=None, draw=5)
    assert torch.equal(nothing.input_ids, ids) and not nothing.chosen.any()


def test_berts_masks_are_80_10_10():
    ids, words = torch.full((1, 20_000), 7), torch.arange(100, 200)
    masked, chosen = mask_tokens(
        ids, torch.ones_like(ids, dtype=torch.bool), share=0.5, mask_id=3, words=words, draw=0
    )
    of_chosen = masked[chosen]
    kinds = {"mask": of_chosen == 3, "same": of_chosen == 7, "random": torch.isin(of_chosen, words)}
    shares = {name: kind.float().mean().item() for name, kind in kinds.items()}
    assert shares == {
        "mask": pytest.approx(0.8, abs=0.02),
        "same": pytest.approx(0.1, abs=0.02),
        "random": pytest.approx(0.1, abs=0.02),
    }
    assert sum(shares.values()) == pytest.approx(1) and of_chosen[kinds["random"]].unique().numel() > 90
    assert (masked[~chosen] == 7).all() and chosen.sum() == 10_000


@pytest.mark.parametrize("bos", [True, False])
def test_only_tokens_of_the_text_that_something_precedes_are_masked(tmp_path, bos):
    model = build_model(save_llm(tmp_path, tokenizer=train_tokenizer(bos=bos)), "mean")
    loss = MNTPLoss(model, mask_share=1.0, masking="all")
    special = torch.tensor(model.tokenizer.all_special_ids)
    blank = model.tokenizer.get_vocab()["_"]
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        for prompt in (None, "Find it: "):
            features = model.preprocess(TEXTS, prompt=prompt)
            ids, real = features["input_ids"], features["attention_mask"].bool()
            masked, chosen = loss.mask(features)
            assert not chosen[~real].any() and not torch.isin(ids[chosen], special).any()
            assert (masked[chosen] == blank).all() and torch.equal(masked[~chosen], ids[~chosen])
            left = real & ~chosen & ~torch.isin(ids, special)
            if prompt:
                assert torch.equal(left, features["instruction_mask"].bool() & ~torch.isin(ids, special))
            else:  # the first token of three texts, where there is no BOS
                assert left.sum() == (0 if bos else 3)
                assert all(
                    row.nonzero()[0] == one.nonzero()[0] for row, one in zip(left, real, strict=True) if row.any()
                )


def test_masks_depend_on_the_text_alone_and_in_training_on_the_step(llm):
    model = build_model(llm, "mean").eval()
    loss = MNTPLoss(model, mask_share=0.5)

    def masks(texts: list[str]) -> list[list[int]]:
        features = model.preprocess(texts)
        masked = loss.mask(features)
        return [
            row[real.bool()].tolist() for row, real in zip(masked.input_ids, features["attention_mask"], strict=True)
        ]

    first = masks(TEXTS)
    state = torch.get_rng_state()
    assert first == masks(TEXTS) == [masks([text])[0] for text in TEXTS]  # in any batch
    assert torch.equal(state, torch.get_rng_state())  # evaluation changes no training
    model.tokenizer.padding_side = "left"
    assert masks(TEXTS) == first
    model.train()
    set_seed(3)
    steps = [masks(TEXTS) for _ in range(3)]
    assert len({json.dumps(step) for step in [first, *steps]}) == 4
    set_seed(3)
    assert [masks(TEXTS) for _ in range(3)] == steps


def test_a_batch_without_words_is_no_loss(llm):
    model = build_model(llm, "mean")
    value = MNTPLoss(model)([model.preprocess(["", ""])])
    value.backward()
    assert value == 0 and model[0].model.get_input_embeddings().weight.grad is not None


@pytest.mark.parametrize("recipe", ["nv-embed", "mean"])
def test_it_trains_the_llm(llm, recipe):
    model = build_model(llm, recipe, attention="bidirectional").train()
    loss = MNTPLoss(model)
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=1e-2)
    history = []
    for _ in range(12):
        optimizer.zero_grad()
        value = loss([model.preprocess(TEXTS)])
        value.backward()
        optimizer.step()
        history.append(value.item())
    assert sum(history[-3:]) < 0.7 * sum(history[:3])


def test_what_cannot_be_is_refused(llm, tmp_path):
    model = build_model(llm, "mean")
    with pytest.raises(ValueError, match="attention='causal'. Valid: 'bidirectional'. Build it so: build_model"):
        MNTPLoss(build_model(llm, "last-token"))
    with pytest.raises(ValueError, match="mask_share=1.2 must be more than 0 and at most 1"):
        MNTPLoss(model, mask_share=1.2)
    with pytest.raises(ValueError, match="masking='most' is unknown. Valid values: bert, all"):
        MNTPLoss(model, masking="most")
    with pytest.raises(ValueError, match="mask_token='<none>' is no token of the LLM's vocabulary. Valid: .*'</s>'"):
        MNTPLoss(model, mask_token="<none>")
    assert MNTPLoss(model, mask_token="</s>").mask_id == model.tokenizer.eos_token_id
    with pytest.raises(ValueError, match=r"the column 'text' alone, got 2 columns.*select_columns\(\['text'\]\)"):
        MNTPLoss(model)([model.preprocess(TEXTS)] * 2)
    with pytest.raises(ValueError, match="does not tie its LM head .*Pass lm_head="):
        MNTPLoss(build_model(save_llm(tmp_path, tie_word_embeddings=False), "mean"))
    rows = Dataset.from_dict({"passage": ["a"]})
    with pytest.raises(ValueError, match=r"has the columns \['passage'\]. MNTPLoss reads 'text'. Rename yours"):
        LLMEmbedTrainer(model, arguments(tmp_path), rows, loss=MNTPLoss(model))


def arguments(folder: Path, **kwargs: object) -> LLMEmbedTrainingArguments:
    usual = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "per_device_train_batch_size": 4}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    return LLMEmbedTrainingArguments(str(folder), **{**usual, **quiet, **kwargs})


ROWS = Dataset.from_dict(
    {"text": [f"the cat sat on {n} mats and seven dogs" for n in range(24)], "next": ["dogs bark", "", "one", "x"] * 6}
)


class StopAfter(TrainerCallback):
    """Ends a run whose schedule is longer."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_it_resumes_as_if_never_interrupted(llm, tmp_path, lora):
    def trainer(folder: str) -> LLMEmbedTrainer:
        torch.manual_seed(0)
        model = build_model(llm, "mean", lora={"r": 2, "lora_alpha": 4, "lora_dropout": 0.1} if lora else False)
        args = arguments(tmp_path / folder, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
        return LLMEmbedTrainer(model, args, ROWS, ROWS.select(range(6)), loss=MNTPLoss(model))

    whole = trainer("whole")
    before = {name: weight.detach().clone() for name, weight in whole.model.named_parameters()}
    whole.train()
    stopped = trainer("stopped")
    stopped.add_callback(StopAfter())
    stopped.train()
    resumed = trainer("stopped")
    resumed.train(resume_from_checkpoint=True)
    losses = [
        [row.get("loss", row.get("eval_loss")) for row in run.state.log_history if {"loss", "eval_loss"} & set(row)]
        for run in (whole, resumed)
    ]
    assert len(losses[0]) == 6 and losses[1] == losses[0] and len(set(losses[0])) == 6
    after = dict(resumed.model.named_parameters())
    moved = {name for name, weight in whole.model.named_parameters() if not torch.equal(before[name], weight)}
    assert moved == {name for name in before if "lora_" in name or not lora}
    for name, weight in whole.model.named_parameters():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=0)
    assert resumed.evaluate()["eval_loss"] == resumed.evaluate()["eval_loss"] == losses[0][-1]


def test_rows_may_have_more_and_may_stream(llm, tmp_path):
    model = build_model(llm, "mean")
    stream = consecutive_texts(
        Dataset.from_dict({"text": ["one cat sat", "two dogs\n\nbarked"] * 4}).to_iterable_dataset(), keep_last=True
    )
    for rows in (ROWS.add_column("id", list(range(24))), stream):
        trainer = LLMEmbedTrainer(model, arguments(tmp_path, max_steps=1), rows, loss=MNTPLoss)
        batch = next(iter(trainer.get_train_dataloader()))
        assert {key.split("_")[0] for key in batch if key.endswith("input_ids")} == {"text"}
        trainer.train()
        assert trainer.state.log_history[0]["loss"] > 0
    assert ROWS.column_names == ["text", "next"]


@pytest.fixture
def settings(llm, tmp_path) -> dict:
    """MNTP on documents, then retrieval."""
    documents = [{"text": f"The cat sat on {n} mats.\n\nSeven dogs were barking."} for n in range(8)]
    documents.append({"text": "One paragraph alone."})
    pairs = [{"anchor": f"how {n}?", "positive": f"so {n}", "negative_1": f"no {n}"} for n in range(8)]
    for name, rows in (("documents", documents), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    read = {"read": "consecutive_texts", "documents": str(tmp_path / "documents.jsonl"), "keep_last": True}
    return {
        "output": str(tmp_path / "run"),
        "model": {"base": llm, "recipe": "mean", "max_seq_length": 32},
        "arguments": {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "use_cpu": True},
        "data": {
            "documents": read,
            "pairs": {
                "read": "from_columns",
                "source": str(tmp_path / "pairs.jsonl"),
                "negatives": ["negative_1"],
                "instruction": "Find it",
            },
        },
        "stages": [
            {"name": "adapt", "data": ["documents"], "loss": {"objective": "mntp", "mask_share": 0.3}},
            {"name": "retrieval", "data": ["pairs"], "arguments": {"stage": 1}},
        ],
    }


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.parent.name if file.parent != folder else ''}/{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_a_stage_of_it_before_retrieval(settings):
    last = train_stages(settings)
    adapted = last.parent.parent / "1-adapt" / "model"
    first, second = weights(adapted), weights(last)
    assert first.keys() == second.keys() and all((first[name] != second[name]).any() for name in first)
    assert not any("lm_head" in name for name in first)
    card = (last / "README.md").read_text()
    assert "| adapt | pretext (MNTP) | documents (a stream) | " in card and "`mask_share=0.3`" in card
    assert SentenceTransformer(str(adapted), trust_remote_code=True).encode("a cat").shape == (32,)


def test_an_untied_llm_by_lora(settings, tmp_path):
    base = save_llm(tmp_path / "untied", tie_word_embeddings=False)
    settings["model"] |= {"base": base, "lora": {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1}}
    with pytest.raises(ValueError, match="does not tie its LM head .*lm_head: base"):
        train_stages(settings)
    settings["stages"][0]["loss"]["lm_head"] = "base"
    last = train_stages(settings)
    first, second = weights(last.parent.parent / "1-adapt" / "model"), weights(last)
    assert first and all("lora_" in name for name in first) and first.keys() == second.keys()
    assert all((first[name] != second[name]).any() for name in first)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_mean_with_the_base_is_half_of_each(settings, tmp_path, lora):
    """As the training guide has it; LoRA is merged before."""
    if lora:
        settings["model"]["lora"] = {"r": 2, "lora_alpha": 4}
    settings["stages"] = settings["stages"][:1]
    adapted = train_stages(settings)
    merged, mean = tmp_path / "merged", tmp_path / "mean"
    if lora:
        with pytest.raises(ValueError, match="holds an adapter alone.*Merge each into its LLM first"):
            average_checkpoints([adapted], mean, base=settings["model"]["base"])
        assert main(["merge", str(adapted), str(merged)]) == 0
        adapted = merged
    assert main(["average", str(adapted), "--base", settings["model"]["base"], "--output", str(mean)]) == 0
    of_adapted, of_mean = map(weights, (adapted, mean))
    plain = AutoModelForCausalLM.from_pretrained(settings["model"]["base"]).base_model.state_dict()
    assert of_mean.keys() == of_adapted.keys() == {f"/{name}" for name in plain}
    for name, tensor in of_mean.items():
        torch.testing.assert_close(tensor, (of_adapted[name] + plain[name[1:]]) / 2, atol=1e-6, rtol=1e-6)
    assert sum((of_mean[name] != of_adapted[name]).any() for name in of_mean) > 10
    if lora:
        return
    went_on = {**settings, "output": str(tmp_path / "second"), "model": {"load": str(mean), "lora": {"r": 2}}}
    went_on["stages"] = [{"name": "retrieval", "data": ["pairs"], "arguments": {"stage": 1}}]
    assert SentenceTransformer(str(train_stages(went_on)), trust_remote_code=True).encode("a cat").shape == (32,)
