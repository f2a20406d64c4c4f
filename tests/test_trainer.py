"""LLMEmbedTrainer: tasks set prompts and losses, the stage switches in-batch negatives, bad data stops early."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, Value
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    CoSENTLoss,
    MarginMSELoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
    TripletLoss,
)
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
from st_llm_embed.losses.row_labels import NONE
from st_llm_embed.tasks import encoding_prompts
from st_llm_embed.training import training_args

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
    assert trainer.plan.groups == {"docs": 0 if stage == 1 else NONE, "topics": NONE}
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
        scores = torch.stack([vector[anchor] @ vector[text] for text in (positive, *negatives)]) / 0.02
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
        assert list(trainer.plan.groups.values()) == groups and trainer.args.blended == blended
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
            expected = model.encode(rows(1)[i]["anchor"], prompt=trainer.plan.tasks[name].prompt)
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


def batches(trainer: LLMEmbedTrainer) -> list[dict]:
    return [
        {key: value for key, value in batch.items() if value is not None} for batch in trainer.get_train_dataloader()
    ]


@pytest.mark.parametrize("how", [{"stage": 1}, {"stage": 2}, {"stage": 1, "blended": True}], ids=str)
@pytest.mark.parametrize("recipe", ["nv-embed", "llara"])
def test_evaluation_data_changes_nothing_in_training(llm, tmp_path, recipe, how):
    """Fewer, more and other columns of negatives, other tasks and sizes."""
    model = build_model(llm, recipe, document_length=40)
    data = {"docs": rows(3), "topics": rows(2)}
    tasks = [replace(DOCS, negatives=3), replace(TOPICS, in_batch_negatives=True)]

    def trainer(evaluated: dict | None) -> LLMEmbedTrainer:
        return LLMEmbedTrainer(model, arguments(tmp_path, max_steps=4, **how), data, evaluated, tasks=tasks)

    expected = trainer(None)
    for evaluated in (
        {"docs": rows(1, 3), "topics": rows(1, 3)},
        {"topics": rows(5, 3)},
        {"docs": rows(1, 3).rename_column("negative_1", "negative")},
    ):
        found = trainer(evaluated)
        for one, other in zip(batches(expected), batches(found), strict=True):
            assert list(one) == list(other)
            assert all(torch.equal(one[key], other[key]) for key in one if isinstance(one[key], torch.Tensor))
        for name, rows_of in evaluated.items():  # and what is evaluated is as if it were alone
            alone = LLMEmbedTrainer(model, arguments(tmp_path, **how), {name: rows_of}, tasks=[DOCS, tasks[1]])
            assert found.evaluate()[f"eval_{name}_loss"] == pytest.approx(
                alone.evaluate({name: rows_of})[f"eval_{name}_loss"], rel=1e-4
            )


def test_pooling_of_prompts_is_asked_of_the_training_data(llm, tmp_path):
    """A task that is only evaluated is in no blended batch."""
    model = build_model(llm, "mean", include_prompt=False)
    data = {"docs": rows(1)}, {"topics": rows(1), "docs": rows(3)}
    LLMEmbedTrainer(model, arguments(tmp_path, stage=2), *data, tasks=[DOCS, TOPICS])


def test_a_data_set_evaluated_later_is_checked_and_has_its_prompts(llm, tmp_path):
    model = build_model(llm, "llara").eval()
    trainer = LLMEmbedTrainer(model, arguments(tmp_path), {"docs": rows(1)}, tasks=[DOCS, TOPICS])
    later = {"topics": rows(2, 4)}
    found = trainer.evaluate(later)["eval_topics_loss"]
    assert found == trainer.evaluate(later)["eval_topics_loss"] and "topics" not in trainer.train_dataset
    known = LLMEmbedTrainer(model, arguments(tmp_path), {"docs": rows(1)}, later, tasks=[DOCS, TOPICS])
    assert found == pytest.approx(known.evaluate()["eval_topics_loss"], rel=1e-5)
    with pytest.raises(ValueError, match="needs a dict of data sets by task name"):
        trainer.evaluate(rows(2, 4))
    with pytest.raises(ValueError, match=r"\['other'\] have no task"):
        trainer.evaluate({"other": rows(2)})


def labelled(values: list, **kwargs) -> Dataset:
    return rows(**kwargs).add_column("label", values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1] * 8, "is 1 in every row.*add rows of other classes if these are classes; dataset.remove_columns"),
        ([True, False] * 4, r"holds \[True, False, True\].*class_encode_column\('label'\)"),
        (["match"] * 8, r"holds \['match', 'match', 'match'\]"),
        ([0.5, 1.0] * 4, r"holds \[0.5, 1.0, 0.5\]"),
        ([None] * 8, r"holds \[None, None, None\]"),
        ([1, None] * 4, r"is None in some rows.*dataset.filter\(lambda row: row\['label'\] is not None\)"),
        ([[0, 1]] * 8, r"holds \[\[0, 1\], \[0, 1\], \[0, 1\]\]"),
    ],
)
def test_a_label_that_is_no_class_is_refused(llm, tmp_path, values, message):
    model = build_model(llm, "mean")
    data = labelled(values, negatives=0)
    for given in ({"train_dataset": {"docs": data}, "tasks": [DOCS]}, {"train_dataset": data, "loss": "own"}):
        if "loss" in given:
            given["loss"] = InstructionContrastiveLoss(model)
        with pytest.raises(ValueError, match=f"Column 'label' of data set '(docs|train)' {message}"):
            LLMEmbedTrainer(model, arguments(tmp_path), **given)


def test_labels_that_are_classes_are_read(llm, tmp_path):
    """Numbers of any width, named classes, -1 for none; few rows of one class may be evaluated."""
    model = build_model(llm, "mean").eval()
    classes = [0, 1, 1, 2, 0, 1, 2, 2]
    expected = None
    for data in (
        labelled(classes, negatives=0),
        labelled(classes, negatives=0).cast_column("label", Value("uint8")),
        labelled(list("abbcabcc"), negatives=0).class_encode_column("label"),
    ):
        evaluated = {"docs": data.select([1, 2])}
        trainer = LLMEmbedTrainer(model, arguments(tmp_path), {"docs": data}, evaluated, tasks=[DOCS])
        batch = trainer.data_collator([{**row, "dataset_name": "docs"} for row in data])
        assert batch["label"][:, 1].tolist() == classes
        with torch.no_grad():
            loss = trainer.compute_loss(model, batch).item()
        assert expected is None or loss == expected
        expected = loss


def test_score_columns_of_the_host_are_no_classes(llm, tmp_path):
    """The host hands score to the loss too, which would cut 0.5 to class 0."""
    model = build_model(llm, "mean")
    data = rows(0).add_column("score", [0.1 * i for i in range(8)])
    with pytest.raises(ValueError, match=r"Column 'score' of data set 'train' holds \[0.0, 0.1, 0.2\]"):
        LLMEmbedTrainer(model, arguments(tmp_path), data, loss=InstructionContrastiveLoss(model))
    args = SentenceTransformerTrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="The labels are torch.float32, such as .*Fix: remove the column"):
        SentenceTransformerTrainer(model, args, data, loss=InstructionContrastiveLoss(model)).train()


def test_a_batch_of_one_row_without_negatives_is_refused(llm, tmp_path):
    model = build_model(llm, "mean")
    for data, batch_size in (({"docs": rows(0)}, 1), ({"docs": rows(0), "more": rows(0, 1)}, 4)):
        args = arguments(tmp_path, per_device_train_batch_size=batch_size)
        trainer = LLMEmbedTrainer(model, args, data, tasks=[DOCS, replace(DOCS, name="more")])
        with pytest.raises(ValueError, match="a batch of one row has no others: its loss is 0"):
            trainer.train()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_sampler": "no_duplicates"}, "batch_sampler=.*no_duplicates.* tasks= make the batches. Set blended"),
        ({"batch_sampler": "group_by_label"}, "batch_sampler=.*has no effect: tasks= make the batches"),
        ({"multi_dataset_batch_sampler": "round_robin"}, "multi_dataset_batch_sampler=.*has no effect: tasks= make"),
        ({"data_seed": 3}, "data_seed=3 has no effect: the order of the rows is that of seed"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no effect: sentence-transformers' trainer"),
        (
            {"train_sampling_strategy": "group_by_length", "stage": 2},
            "train_sampling_strategy='group_by_length' has no effect: tasks= make the batches, at random or, unless",
        ),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy='sequential' has no effect"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 has no effect"),
        ({"stage": 2, "false_negative_margin": 0.9}, "false_negative_margin=0.9 .*no task has in-batch negatives"),
        ({"in_batch_negatives": False, "gather_across_devices": True}, "gather_across_devices=True .*no task has"),
    ],
)
def test_arguments_without_effect_on_tasks_are_refused(llm, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        LLMEmbedTrainer(build_model(llm, "mean"), arguments(tmp_path, **given), {"docs": rows()}, tasks=[DOCS])


OF_TASKS = {
    "stage": 2,
    "temperature": 0.5,
    "in_batch_negatives": False,
    "blended": True,
    "sampling_temperature": 2.0,
    "false_negative_margin": 0.9,
    "mini_batch_size": 2,
    "gather_across_devices": True,
    "spread_weight": 0.5,
    "distill_weight": 2.0,
    "score_weight": 0.5,
    "soft_label_weight": 0.5,
    "contrastive_weight": 0.5,
    "query_regularizer_weight": 0.5,
    "document_regularizer_weight": 0.5,
    "score_temperature": 0.5,
    "soft_label_temperature": 2.0,
}


def test_arguments_of_tasks_have_no_effect_without(llm, tmp_path):
    model = build_model(llm, "llara")
    assert set(OF_TASKS) == set(training_args.OF_TASKS)
    for name, value in OF_TASKS.items():
        args = arguments(tmp_path, **{name: value})
        with pytest.raises(ValueError, match=f"{name}={value} has no effect: it is read with tasks="):
            LLMEmbedTrainer(model, args, Dataset.from_dict(PRETEXT), loss=PretextLoss(model))
        if name in training_args.OF_THE_LOSS:
            with pytest.raises(ValueError, match=f"{name}={value} has no effect: the loss is one of your own"):
                loss = MatryoshkaLoss(model, InstructionContrastiveLoss(model), [32, 8])
                LLMEmbedTrainer(model, args, {"docs": rows()}, loss=loss, tasks=[DOCS])


def test_losses_that_do_not_keep_to_the_tasks_are_refused(llm, tmp_path):
    """MultipleNegativesRankingLoss would take "" for a negative in blended batches, in stage 2 other rows' texts."""
    model = build_model(llm, "mean")
    data, tasks = {"docs": rows(3), "topics": rows(1)}, [DOCS, TOPICS]
    for loss in (MultipleNegativesRankingLoss(model), MarginMSELoss, CoSENTLoss(model), lambda m: TripletLoss(m)):
        with pytest.raises(ValueError, match="Loss does not read which rows are each other's negatives"):
            LLMEmbedTrainer(model, arguments(tmp_path, stage=2), data, loss=loss, tasks=tasks)
    own = {"docs": InstructionContrastiveLoss(model, scale=10), "topics": InstructionContrastiveLoss(model)}
    with pytest.raises(ValueError, match="In blended batches all tasks have one loss"):
        LLMEmbedTrainer(model, arguments(tmp_path, stage=2), data, loss=own, tasks=tasks)
    trainer = LLMEmbedTrainer(model, arguments(tmp_path), data, loss=own, tasks=tasks)
    trainer.train()
    off = {**own, "docs": InstructionContrastiveLoss(model, in_batch_negatives=False)}
    for loss in (off, off["docs"]):
        with pytest.raises(ValueError, match="'docs' has in-batch negatives, and the loss in_batch_negatives=False"):
            LLMEmbedTrainer(model, arguments(tmp_path), data, loss=loss, tasks=tasks)
    with pytest.raises(ValueError, match="tasks= brings its own collator"):
        collator = trainer.data_collator
        LLMEmbedTrainer(model, arguments(tmp_path), data, tasks=tasks, data_collator=collator)


def test_tasks_that_say_nothing_are_refused(llm, tmp_path):
    model = build_model(llm, "mean")
    for tasks in ([], [DOCS, replace(DOCS, instruction="Find something else")]):
        with pytest.raises(ValueError, match="tasks= takes one task or more, each with a name of its own"):
            LLMEmbedTrainer(model, arguments(tmp_path), {"docs": rows()}, tasks=tasks)


def test_forgetting_tasks_says_so(llm, tmp_path):
    model = build_model(llm, "mean")
    for data in ({"docs": rows()}, rows(), labelled(list(range(8))), rows().to_iterable_dataset()):
        with pytest.raises(ValueError, match="has neither a task nor a loss. Pass tasks=.Task"):
            LLMEmbedTrainer(model, arguments(tmp_path), data)
    with pytest.raises(ValueError, match="args is SentenceTransformerTrainingArguments. LLMEmbedTrainer takes"):
        args = SentenceTransformerTrainingArguments(str(tmp_path), report_to=[])
        LLMEmbedTrainer(model, args, {"docs": rows()}, tasks=[DOCS])
    scored = rows(0).rename_columns({"anchor": "sentence1", "positive": "sentence2"})  # the host's default reads it
    scored = scored.add_column("score", [0.1 * i for i in range(8)])
    LLMEmbedTrainer(model, arguments(tmp_path), scored).train()


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_the_callers_data_sets_stay_as_they_are(llm, tmp_path, kind):
    model = build_model(llm, "mean")
    data, evaluated = kind({"docs": rows(), "topics": rows()}), kind({"docs": rows(1).with_format("numpy")})

    def state() -> list[tuple]:
        return [(name, id(of), of.format, of[0]) for part in (data, evaluated) for name, of in part.items()]

    before = state()
    trainer = LLMEmbedTrainer(model, arguments(tmp_path), data, evaluated, tasks=[DOCS, TOPICS])
    trainer.train()
    trainer.evaluate(evaluated)
    losses = dict.fromkeys(data, InstructionContrastiveLoss(model))
    LLMEmbedTrainer(model, arguments(tmp_path), data, loss=losses).train()
    assert state() == before


def stream(documents: int, texts: int) -> IterableDataset:
    """Of documents one after the other, as a file has them."""
    lines = Dataset.from_dict(
        {"text": [f"d {n} . " + " ".join(f"\n\nd {n} {i}" for i in range(texts)) for n in range(documents)]}
    )
    return consecutive_texts(lines.to_iterable_dataset())


def test_a_stream_is_shuffled_and_resumes(llm, tmp_path):
    """Batches mix documents, an epoch has each row once, another epoch has another order, and one resumed the same."""
    model = build_model(llm, "llara")

    def trainer(folder: str, steps: int = 9) -> LLMEmbedTrainer:
        args = arguments(tmp_path / folder, max_steps=steps, save_strategy="steps", save_steps=5, seed=3)
        model.load_state_dict(start)
        return LLMEmbedTrainer(model, args, stream(4, 6), loss=PretextLoss(model))

    def seen(of: LLMEmbedTrainer, epoch: int) -> list[list[str]]:
        loader = of.get_train_dataloader()
        loader.set_epoch(epoch)
        return [model.tokenizer.batch_decode(batch["text_input_ids"], skip_special_tokens=True) for batch in loader]

    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    whole = trainer("whole")
    first, second = (seen(whole, epoch) for epoch in (0, 1))
    assert first == seen(whole, 0) != second
    assert sum(len({text.split()[1] for text in batch}) > 1 for batch in first) == len(first) == 6
    rows_of = [text for batch in first for text in batch]
    assert len(rows_of) == len(set(rows_of)) == 24 and sorted(rows_of) == sorted(t for b in second for t in b)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    resumed = trainer("whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == losses and len(losses) == 9


def test_a_stream_without_rows_is_refused(llm, tmp_path):
    model = build_model(llm, "llara")
    nothing = (
        "Data set 'train' cannot be read: No text has a next one: of 3 documents, 0 are empty and 3 have one text"
    )
    alone = Dataset.from_dict({"text": ["one paragraph"] * 3}).to_iterable_dataset()
    with pytest.raises(ValueError, match=nothing):
        LLMEmbedTrainer(model, arguments(tmp_path), consecutive_texts(alone), loss=PretextLoss(model))
    features = Dataset.from_dict({"text": ["a"], "next": ["b"]}).features
    empty = IterableDataset.from_generator(lambda: iter([]), features=features)
    for loss in (PretextLoss(model), lambda model: PretextLoss(model)):
        with pytest.raises(ValueError, match="Data set 'train' has no rows"):
            LLMEmbedTrainer(model, arguments(tmp_path), empty, loss=loss)
    with pytest.raises(ValueError, match="Data set 'eval' has the columns .*PretextLoss reads"):
        LLMEmbedTrainer(model, arguments(tmp_path), stream(2, 2), rows(), loss=PretextLoss(model))


def test_a_run_without_a_step_is_an_error(llm, tmp_path):
    """A stream may end before its first batch."""
    model = build_model(llm, "llara")
    args = arguments(tmp_path, per_device_train_batch_size=64, dataloader_drop_last=True)
    trainer = LLMEmbedTrainer(model, args, stream(2, 2), loss=PretextLoss(model))
    with pytest.raises(
        ValueError, match="Nothing was trained: the data gave no batch.*per_device_train_batch_size=64"
    ):
        trainer.train()
