"""LLMEmbedTrainer: tasks set prompts and losses, the stage switches in-batch negatives, bad data stops early."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, IterableDataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import TrainerCallback

from st_llm_embed import (
    InstructionContrastiveLoss,
    LLMEmbedTrainer,
    LLMEmbedTrainingArguments,
    PretextLoss,
    Task,
    build_model,
)
from st_llm_embed.data import consecutive_texts, from_class_examples, sentences
from st_llm_embed.losses.instruction_contrastive import NONE
from st_llm_embed.tasks import encoding_prompts

DOCS = Task("docs", "Given a question, retrieve passages that answer it")
TOPICS = Task("topics", "Identify the topic", "classification")


def rows(negatives: int = 2, count: int = 8) -> Dataset:
    columns = ["anchor", "positive", *(f"negative_{i + 1}" for i in range(negatives))]
    return Dataset.from_dict({c: [f"{c} about cats number {i}" for i in range(count)] for c in columns})


def arguments(folder, **kwargs) -> LLMEmbedTrainingArguments:
    defaults = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "save_strategy": "no"}
    quiet = {"disable_tqdm": True, "logging_steps": 1, "use_cpu": True, "learning_rate": 1e-3}
    return LLMEmbedTrainingArguments(str(folder), **{**defaults, **quiet, **kwargs})


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_tasks_say_what_goes_where():
    assert DOCS.prompt == "Instruct: Given a question, retrieve passages that answer it\nQuery: "
    assert DOCS.column_prompts(["anchor", "positive", "negative"], {}) == {"anchor": DOCS.prompt}
    assert TOPICS.column_prompts(["anchor", "positive"], {}) == {"anchor": TOPICS.prompt, "positive": TOPICS.prompt}
    assert DOCS.in_batch_negatives and not TOPICS.in_batch_negatives
    assert not Task("x", "y", in_batch_negatives=False).in_batch_negatives
    assert encoding_prompts([TOPICS, DOCS], {}) == {
        "topics": TOPICS.prompt,
        "docs": DOCS.prompt,
        "query": DOCS.prompt,
    }
    with pytest.raises(ValueError, match="kind='search'. Valid kinds: retrieval, sts"):
        Task("x", "y", "search")
    with pytest.raises(ValueError, match="needs a name and an instruction"):
        Task("x", "")


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("recipe", ["nv-embed", "llara"])
def test_both_stages_train_every_weight_and_save_the_prompts(llm, tmp_path, stage, recipe):
    model = build_model(llm, recipe)
    before = parameters(model)
    data = {"docs": rows(), "topics": rows(1)}
    trainer = LLMEmbedTrainer(model, arguments(tmp_path, stage=stage, max_steps=4), data, tasks=[DOCS, TOPICS])
    assert trainer.loss.in_batch_negatives == (stage == 1)
    assert trainer.groups == {"docs": 0 if stage == 1 else NONE, "topics": NONE}
    assert trainer.loss.scale == pytest.approx(50)
    trainer.train()
    assert moved(model, before) == set(before)
    suffix = {"nv-embed": "", "llara": "{text} The next sentence:"}[recipe]
    assert model.prompts["docs"] == model.prompts["query"] == DOCS.prompt + suffix
    assert model.prompts["topics"].startswith(TOPICS.prompt)


def test_the_instruction_reaches_the_model_and_stays_out_of_the_pool(llm, tmp_path):
    model = build_model(llm)
    trainer = LLMEmbedTrainer(model, arguments(tmp_path), {"docs": rows()}, tasks=[DOCS])
    batch = next(iter(trainer.get_train_dataloader()))
    prompt = model.tokenizer(DOCS.prompt, add_special_tokens=False)["input_ids"]
    assert batch["anchor_input_ids"][0, 1 : len(prompt)].tolist() == prompt[:-1]  # the last is a space that may merge
    assert batch["anchor_instruction_mask"][0].sum() in (len(prompt), len(prompt) + 1)
    assert "positive_instruction_mask" not in batch


def test_llaras_prompts_and_the_tasks_join(llm, tmp_path):
    """What a text looks like in training is what it looks like in encode_query and encode_document, in both stages."""
    model = build_model(llm, "llara")
    document = model.prompts["document"]
    for stage in (1, 2):
        trainer = LLMEmbedTrainer(model, arguments(tmp_path, stage=stage), {"docs": rows()}, tasks=[DOCS, TOPICS])
        query = DOCS.prompt + "{text} The next sentence:"
        assert trainer.args.prompts["docs"] == {"anchor": query} | {
            column: document for column in ("positive", "negative_1", "negative_2")
        }
        assert model.prompts["query"] == query and model.prompts["document"] == document
        assert model.prompts["topics"] == TOPICS.prompt + "{text} The original sentence:"
        batch = next(iter(trainer.get_train_dataloader()))
        text = model.tokenizer.decode(batch["anchor_input_ids"][0], skip_special_tokens=True)
        assert text.startswith("Instruct: Given") and text.rstrip().endswith("The next sentence:")


def test_gradient_cached_losses_give_the_same_gradients(llm):
    """They embed the same features twice, so neither the mask nor anything else in them may change on the way."""
    model = build_model(llm).eval()
    data = rows(1)
    gradients = []
    for loss in (
        InstructionContrastiveLoss(model),
        CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=3),
    ):
        features = [model.preprocess(data["anchor"], prompt=DOCS.prompt)]
        features += [model.preprocess(data[column]) for column in ("positive", "negative_1")]
        model.zero_grad()
        loss(features, None).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    plain, cached = gradients
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    for name in plain:
        torch.testing.assert_close(cached[name], plain[name], atol=1e-4, rtol=1e-3)


def test_the_hosts_own_trainer_trains_our_models(llm, tmp_path):
    model = build_model(llm)
    before = parameters(model)
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), prompts={"anchor": DOCS.prompt}, max_steps=2, learning_rate=1e-3, report_to=[], use_cpu=True
    )
    SentenceTransformerTrainer(model, args, rows(), loss=InstructionContrastiveLoss(model)).train()
    assert moved(model, before) == set(before)


def test_pretext_logs_its_parts(llm, tmp_path):
    model = build_model(llm)
    data = Dataset.from_dict({"text": ["the cat sat"] * 4, "next": ["dogs bark", "", "a", "b"]})
    trainer = LLMEmbedTrainer(model, arguments(tmp_path), data, loss=PretextLoss(model))
    before = parameters(model)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert all(entry["loss"] == pytest.approx(entry["ebae"] + entry["ebar"], abs=1e-2) for entry in logged)
    assert {name for name in before if name.startswith("0.")} == moved(model, before)


def test_the_release_variant_trains_with_its_prefix_and_logs_three_parts(llm, tmp_path):
    model = build_model(llm, "llara-release")
    data = Dataset.from_dict({"text": ["the cat sat"] * 4, "next": ["dogs bark", "", "a", "b"]})
    loss = PretextLoss(model, model.prompts["document"], model.prompts["query"], num_tokens=8, form="release")
    added = model.tokenizer.convert_tokens_to_ids([f"<s{i}>" for i in range(1, 17)])
    before = model[0].model.get_input_embeddings().weight[added].detach().clone()
    trainer = LLMEmbedTrainer(model, arguments(tmp_path), data, loss=loss)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["ebae"] + entry["ebar"] + entry["ar"], abs=1e-2)
    after = model[0].model.get_input_embeddings().weight[added]
    assert (after - before).abs().amax(dim=1).min() > 0  # every added token learns


PRETEXT = {"text": [f"the cat sat on {n} mats" for n in range(24)], "next": ["dogs bark", "", "one", "fox"] * 6}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"lora": True},
        pytest.param(
            {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow
        ),
    ],
    ids=["full", "lora", "bf16, checkpointing, accumulation"],
)
def test_pretext_resumes_as_if_never_interrupted(llm, tmp_path, how):
    """Losses and weights after a stop in the middle and a resumption, with evaluation and its parts on the way."""
    arguments_of_training = {k: v for k, v in how.items() if k != "lora"}

    def trainer(folder, **kwargs) -> LLMEmbedTrainer:
        torch.manual_seed(0)
        model = build_model(llm, "llara-release", lora="lora" in how)
        loss = PretextLoss(model, model.prompts["document"], model.prompts["query"], num_tokens=8, form="release")
        schedule = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "eval_strategy": "epoch"}
        args = arguments(folder, **schedule, **arguments_of_training, **kwargs)
        data = Dataset.from_dict(PRETEXT)
        return LLMEmbedTrainer(model, args, data, data.select(range(6)), loss=loss)

    whole = trainer(tmp_path / "whole")
    whole.train()
    stopped = trainer(tmp_path / "stopped")
    stopped.add_callback(StopAfter(2))
    stopped.train()
    assert stopped.state.global_step == 2
    resumed = trainer(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    names = ("loss", "ebae", "ebar", "ar")
    losses = [
        [[row[name] for name in names] for row in run.state.log_history if "loss" in row] for run in (whole, resumed)
    ]
    assert len(losses[0]) == 4 and losses[1] == losses[0]
    before, after = parameters(whole.model), parameters(resumed.model)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=0)
    evaluated = resumed.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], abs=1e-5)


class StopAfter(TrainerCallback):
    """Ends a run whose schedule is longer."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_lora_trains_added_tokens_as_full_training_would(llm, tmp_path):
    """Their gradients, as input and as rows of the tied LM head, are those of the whole embedding matrix."""
    gradients = {}
    for lora in (False, True):
        torch.manual_seed(0)
        model = build_model(llm, "llara-release", lora=lora)
        loss = PretextLoss(model, model.prompts["document"], model.prompts["query"], num_tokens=8, form="release")
        added = model.tokenizer.convert_tokens_to_ids([f"<s{i}>" for i in range(1, 17)])
        model.eval()
        features = [model.preprocess(PRETEXT["text"][:3], prompt='"{text}'), model.preprocess(PRETEXT["next"][:3])]
        sum(loss(features).values()).backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if lora:
            name = next(name for name in trained if "trainable_tokens" in name)
            assert all("lora_" in other for other in trained if other != name)
            gradients[lora] = trained[name].grad
        else:
            gradients[lora] = model[0].model.get_input_embeddings().weight.grad[added]
    assert gradients[True].abs().sum(dim=1).min() > 0
    torch.testing.assert_close(gradients[True], gradients[False], atol=1e-6, rtol=1e-4)


def test_an_adapter_with_added_tokens_comes_back_alone(llm, tmp_path):
    """Without the base's weights in its folder: the base gets room for the tokens before their embeddings arrive."""
    model = build_model(llm, "llara-release", lora=True, num_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    texts = ["the cat sat", ""]
    expected = model.encode_query(texts)
    for generation in ("first", "second"):
        model.save_pretrained(str(tmp_path / generation))
        assert not (tmp_path / generation / "model.safetensors").exists()
        model = SentenceTransformer(str(tmp_path / generation), trust_remote_code=True)
        assert model[0].config.num_hidden_layers == 1
        assert model.encode_query(texts) == pytest.approx(expected, abs=1e-6)


def test_repllamas_fine_tuning(llm, tmp_path):
    """LoRA, one positive and fifteen negatives, temperature 0.01, each side cut at a length of its own."""
    model = build_model(llm, "llara", lora=True, query_length=64, document_length=96)
    data = rows(15).map(lambda row: {column: text + " and dogs" * 60 for column, text in row.items()})
    args = arguments(tmp_path, temperature=0.01, learning_rate=3e-4)
    trainer = LLMEmbedTrainer(model, args, {"docs": data}, tasks=[DOCS])
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["anchor_input_ids"].shape[1] == 64 and batch["negative_15_input_ids"].shape[1] == 96
    queries = model.preprocess(data["anchor"], prompt=model.prompts["query"], task="query")["input_ids"].tolist()
    suffix = model[0].tokenize_part(" The next sentence:") + [model.tokenizer.eos_token_id]
    for row in batch["anchor_input_ids"].tolist():
        assert row in queries and row[-len(suffix) :] == suffix  # as encode_query has it
    before = parameters(model)
    trainer.train()
    learned = moved(model, before)
    assert learned and all("lora_" in name for name in learned)


def test_pretext_rows_may_stream(llm, tmp_path):
    model = build_model(llm, "llara")
    documents = Dataset.from_dict({"text": ["the cat sat. Dogs bark. A fox. Even cats."] * 3})
    stream = consecutive_texts(documents.to_iterable_dataset(), sentences, stop_words={"the"})
    trainer = LLMEmbedTrainer(model, arguments(tmp_path), stream, loss=PretextLoss(model))
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.state.log_history[0]["ebae"] > 0


def test_the_best_checkpoint_comes_back(llm, tmp_path):
    """The host matches a checkpoint's classes by dotted name; a rewritten reference would silently keep the last."""
    model = build_model(llm)
    args = arguments(
        tmp_path,
        max_steps=2,
        learning_rate=0.5,  # the second step ruins what the first found
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_docs_loss",
        greater_is_better=True,  # so that the worse loss is "best": the one that is not last
    )
    trainer = LLMEmbedTrainer(model, args, {"docs": rows()}, {"docs": rows(count=4)}, tasks=[DOCS])
    trainer.train()
    best = trainer.state.best_model_checkpoint
    losses = {e["step"]: e["eval_docs_loss"] for e in trainer.state.log_history if "eval_docs_loss" in e}
    assert best.endswith(f"checkpoint-{max(losses, key=losses.get)}") and losses[1] != losses[2]
    assert trainer.evaluate()["eval_docs_loss"] == pytest.approx(max(losses.values()), rel=1e-4)


def test_a_blended_batch_is_its_rows_each_under_its_own_prompt(llm, tmp_path):
    """Both sides of a symmetric task, a plain document, fewer negatives than the others: as if tokenized alone."""
    model = build_model(llm)
    data = {"docs": rows(2), "topics": rows(1)}
    for side in ("right", "left"):
        model.tokenizer.padding_side = side
        args = arguments(tmp_path, stage=1, blended=True)
        collator = LLMEmbedTrainer(model, args, data, tasks=[DOCS, TOPICS]).data_collator
        mixed = [("docs", 0), ("topics", 3), ("docs", 5)]
        batch = collator([{**data[name][i], "dataset_name": name} for name, i in mixed])
        assert batch["dataset_name"] == "docs, topics"
        for column in ("anchor", "positive", "negative_1", "negative_2"):
            features = {key: batch[f"{column}_{key}"] for key in ("input_ids", "attention_mask")}
            mask = batch.get(f"{column}_instruction_mask", torch.zeros_like(features["input_ids"]))
            for row, (name, i) in enumerate(mixed):
                task = DOCS if name == "docs" else TOPICS
                text = data[name][i].get(column, "")
                prompt = task.prompt if column == "anchor" or (name == "topics" and text) else None
                alone = model.preprocess([text], prompt=prompt)
                real = features["attention_mask"][row].bool()
                assert features["input_ids"][row][real].tolist() == alone["input_ids"][0].tolist()
                wanted = alone.get("instruction_mask", torch.zeros_like(alone["input_ids"]))
                assert mask[row][real].tolist() == wanted[0].tolist()
        assert batch["label"][:, 0].tolist() == [0, NONE, 0] and (batch["label"][:, 1] == NONE).all()
        assert batch["label"][1, -1] == NONE and (batch["label"][[0, 2], 2:] != NONE).all()


def test_class_examples_take_no_text_of_their_class_for_a_negative(llm, tmp_path):
    """In-batch negatives of classes, from the builder to the loss: alone, and blended with a task without classes."""
    label_of = {f"{animal} text number {n}": animal for animal in ("cat", "dog", "fox") for n in range(20)}
    source = Dataset.from_dict({"text": list(label_of), "label": list(label_of.values())})
    data = {"topics": from_class_examples(source, negatives=2), "docs": rows(1, count=60)}
    model = build_model(llm).eval()
    args = arguments(tmp_path, in_batch_negatives=True, blended=True)
    trainer = LLMEmbedTrainer(model, args, data, tasks=[TOPICS, DOCS])
    assert trainer.args.prompts["topics"].keys() == {"anchor", "positive", "negative_1", "negative_2"}
    batch = {name: [{**row, "dataset_name": name} for row in data[name].select(range(0, 60, 10))] for name in data}

    def loss(mixed: list[dict]) -> float:
        features, labels = trainer.collect_features(trainer.data_collator(mixed))
        with torch.no_grad():
            return trainer.loss(features, labels).item()

    expected, against = [], []
    texts = [[row[column] for column in ("anchor", "positive", "negative_1", "negative_2")] for row in batch["topics"]]
    vector = {text: torch.from_numpy(model.encode(text, prompt=TOPICS.prompt)) for row in texts for text in row}
    for anchor, positive, *negatives in texts:
        for other, its_positive, *its_negatives in texts:
            if other != anchor:  # of its class, its negatives are wrong here; of another one, its positive is
                negatives = negatives + (its_negatives if label_of[other] == label_of[anchor] else [its_positive])
        assert all(label_of[text] != label_of[anchor] for text in negatives)
        against += negatives
        scores = torch.stack([vector[anchor] @ vector[text] for text in (positive, *negatives)]) / args.temperature
        expected.append((scores.logsumexp(0) - scores[0]).item())
    assert len(against) == 6 * (2 + 2 + 4)
    alone = loss(batch["topics"])
    assert alone == pytest.approx(sum(expected) / 6, rel=1e-4)
    assert alone != pytest.approx(loss([{**row, "label": NONE} for row in batch["topics"]]), rel=1e-2)
    assert loss(batch["topics"] + batch["docs"]) == pytest.approx((alone + loss(batch["docs"])) / 2, rel=1e-4)
    trainer.train()


def test_in_batch_negatives_and_blending_may_be_set_for_an_ablation(llm, tmp_path):
    model, data = build_model(llm), {"docs": rows(2), "topics": rows(2)}
    for stage, on, blended, groups in (
        (1, None, False, [0, NONE]),
        (2, None, True, [NONE, NONE]),
        (2, True, True, [0, 1]),
        (1, False, False, [NONE, NONE]),
    ):
        args = arguments(tmp_path, stage=stage, in_batch_negatives=on)
        trainer = LLMEmbedTrainer(model, args, data, tasks=[DOCS, TOPICS])
        assert list(trainer.groups.values()) == groups and trainer.args.blended == blended
        assert trainer.loss.in_batch_negatives == (groups != [NONE, NONE])


def test_a_loss_that_is_no_number_stops_with_its_place(llm, tmp_path):
    model = build_model(llm)
    trainer = LLMEmbedTrainer(model, arguments(tmp_path), {"docs": rows()}, tasks=[DOCS])
    with torch.no_grad():
        model[0].model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss of task 'docs' is nan at step 1. Its batch .*about cats"):
        trainer.train()


def test_tasks_take_a_loss_around_the_loss(llm, tmp_path):
    model = build_model(llm)
    before = parameters(model)
    loss = MatryoshkaLoss(model, InstructionContrastiveLoss(model, in_batch_negatives=False), [32, 8])
    LLMEmbedTrainer(model, arguments(tmp_path, stage=2), {"docs": rows()}, loss=loss, tasks=[DOCS]).train()
    assert moved(model, before) == set(before)


def bad(**columns):
    return Dataset.from_dict(columns)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bad(query=["a"], positive=["b"]), r"\['query', 'positive'\]. Expected.*Fix: dataset.rename_columns"),
        (bad(positive=["a"], anchor=["b"]), "in this order: 'anchor', 'positive'"),
        (bad(anchor=["a"], positive=["b"], neg=["c"]), "'negative', or 'negative_1'"),
        (bad(anchor=["a"], positive=[3]), "Column 'positive' of data set 'docs' holds .*int64.*not text"),
        (bad(anchor=["a", "a"], positive=["b", " \n"]), "Row 1 of data set 'docs' has an empty 'positive'"),
        (bad(anchor=["a", None], positive=["b", "c"]), "Row 1 of data set 'docs' has an empty 'anchor'"),
        (bad(anchor=["a"], positive=["b"]).filter(lambda row: False), "Data set 'docs' has no rows"),
        (bad(anchor=["a", "", "c"], positive=["b"] * 3).select([2, 1]), "Row 1 of data set 'docs'"),
    ],
)
def test_bad_data_is_refused_before_training(llm, tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        LLMEmbedTrainer(build_model(llm, "mean"), arguments(tmp_path), {"docs": data}, tasks=[DOCS])


def test_bad_arguments_are_refused(llm, tmp_path):
    model = build_model(llm, "mean")
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="needs a dict of data sets by task name, such as {'docs': dataset}"):
        LLMEmbedTrainer(model, args, rows(), tasks=[DOCS])
    with pytest.raises(ValueError, match=r"\['other'\] have no task. Tasks: \['docs'\]"):
        LLMEmbedTrainer(model, args, {"other": rows()}, tasks=[DOCS])
    with pytest.raises(ValueError, match="leave out args.prompts and args.router_mapping"):
        LLMEmbedTrainer(model, arguments(tmp_path, prompts="Query: "), {"docs": rows()}, tasks=[DOCS])
    for bad_task, bad_rows in ((TOPICS, rows(0)), (DOCS, rows(0))):
        with pytest.raises(ValueError, match="without in-batch negatives, and its data set has no negatives. Mine"):
            in_stage = arguments(tmp_path, stage=1 if bad_task is TOPICS else 2)
            LLMEmbedTrainer(model, in_stage, {bad_task.name: bad_rows}, tasks=[bad_task])
    with pytest.raises(ValueError, match="has 2 columns of negatives, and its task asks for negatives=7"):
        LLMEmbedTrainer(model, args, {"docs": rows()}, tasks=[replace(DOCS, negatives=7)])
    with pytest.raises(ValueError, match=r"stage=3 is unknown. Valid stages: 1"):
        arguments(tmp_path, stage=3)
    for name in ("temperature", "sampling_temperature", "false_negative_margin", "mini_batch_size"):
        with pytest.raises(ValueError, match=f"{name}=0 must be positive"):
            arguments(tmp_path, **{name: 0})
    with pytest.raises(ValueError, match="PretextLoss reads 'text', 'next' and perhaps 'target'"):
        LLMEmbedTrainer(model, args, bad(sentence=["a"]), loss=PretextLoss(model))
    stream = IterableDataset.from_generator(
        lambda: iter([{"text": 1, "next": "b"}]), features=bad(text=[1], next=["b"]).features
    )
    with pytest.raises(ValueError, match="Column 'text' of data set 'train' holds"):
        LLMEmbedTrainer(model, args, stream, loss=PretextLoss(model))


def test_pooling_that_cannot_leave_out_blended_prompts_is_refused(llm, tmp_path):
    """sentence-transformers' own knows one prompt for a batch, unless our backbone tells it each text's."""
    data = {"docs": rows(1), "topics": rows(1)}
    stock = SentenceTransformer(modules=[Transformer(llm), Pooling(32, include_prompt=False)])
    stock.tokenizer.pad_token = stock.tokenizer.eos_token
    with pytest.raises(ValueError, match="Pooling.include_prompt=False. can leave out only one.*Set blended=False"):
        LLMEmbedTrainer(stock, arguments(tmp_path, stage=2), data, tasks=[DOCS, TOPICS])
    model = build_model(llm, "mean", include_prompt=False).eval()
    for own, tasks, blended in (
        (data, [DOCS, TOPICS], True),
        ({"docs": rows(1)}, [DOCS], True),
        ({"docs": rows(1), "same": rows(1)}, [DOCS, replace(DOCS, name="same")], True),
        (data, [DOCS, TOPICS], False),
    ):
        trainer = LLMEmbedTrainer(model, arguments(tmp_path, stage=2, blended=blended), own, tasks=tasks)
        names = list(own) if blended else ["topics"]
        batch = trainer.data_collator([{**rows(1)[i], "dataset_name": name} for i, name in enumerate(names)])
        features, _ = trainer.collect_features(batch)
        with torch.no_grad():
            vectors = model(features[0])["sentence_embedding"].numpy()
        for i, name in enumerate(names):
            expected = model.encode(rows(1)[i]["anchor"], prompt=trainer.tasks[name].prompt)
            assert vectors[i] == pytest.approx(expected, abs=1e-6)
    stock.set_pooling_include_prompt(True)
    LLMEmbedTrainer(stock, arguments(tmp_path, stage=2), data, tasks=[DOCS, TOPICS])


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_uploads_during_training_are_refused(tmp_path, strategy):
    with pytest.raises(ValueError, match=f"hub_strategy='{strategy}' uploads checkpoints.*Use hub_strategy='end'"):
        arguments(tmp_path, push_to_hub=True, hub_strategy=strategy)
    arguments(tmp_path, push_to_hub=True, hub_strategy="end")
    arguments(tmp_path, hub_strategy=strategy)


def test_publishing_shards_is_refused(llm, tmp_path):
    trainer = LLMEmbedTrainer(build_model(llm, "mean"), arguments(tmp_path), {"docs": rows()}, tasks=[DOCS])
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="Under FSDP no process has the whole model.*st-llm-embed publish FOLDER"):
        trainer.push_to_hub()


def test_arguments_do_not_leak_between_trainers(llm, tmp_path):
    """args.prompts is set by tasks; the caller's own object must not change under them."""
    args = arguments(tmp_path)
    before = copy.deepcopy(args.prompts)
    LLMEmbedTrainer(build_model(llm, "mean"), args, {"docs": rows()}, tasks=[DOCS])
    assert args.prompts == before
