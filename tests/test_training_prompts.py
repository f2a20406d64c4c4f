"""What training sees is what encoding sees: token ids and instruction masks of every column, for any prompts."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, Task, build_model
from st_llm_embed.evaluation.encoder import PromptedEncoder
from st_llm_embed.modules import LLMBackbone

DOCS = Task("docs", "Find it")
TOPICS = Task("topics", "Tell the topic", "classification")
TEXTS = ["the cat sat", "seven dogs were barking at the moon", "a " * 70]
# The prompts of a model, and which is its default.
PROMPTS = {
    "none": ({}, None),
    "document": ({"query": "Question: ", "document": "Passage: "}, None),
    "passage": ({"query": "Question: ", "passage": "Passage: "}, None),
    "corpus, no query": ({"corpus": "Text:\n"}, None),
    "an empty document hides the passage": ({"document": "", "passage": "Passage: "}, None),
    "around the text": ({"query": "Q: {text} is", "document": "Doc: {text} end", "similarity": "{text} means"}, None),
    "before the text": ({"document": '"{text}', "similarity": "Text: {text}"}, None),
    "a default for all": ({"any": "Any: "}, "any"),
    "a default after the text": ({"any": "{text} in a word"}, "any"),
    "the query is the default": ({"query": "Question: "}, "query"),
    "a task's name is taken": ({"docs": "old: ", "topics": "old: {text}", "document": "Passage: "}, "docs"),
}


def model_with(base: str, recipe: str, prompts: str) -> SentenceTransformer:
    model = build_model(base, recipe, query_length=48, document_length=64)
    if prompts != "the recipe's":
        model.prompts, model.default_prompt_name = dict(PROMPTS[prompts][0]), PROMPTS[prompts][1]
    return model


@contextmanager
def batches_of(model: SentenceTransformer):
    """What reaches the modules while something encodes."""
    seen = []
    hook = model[0].register_forward_pre_hook(lambda module, arguments: seen.append(dict(arguments[0])))
    yield seen
    hook.remove()


def tokens(features: dict, prefix: str = "") -> list[tuple[list[int], list[int]]]:
    """Each text's ids and instruction mask, without padding, in the order of the ids."""
    ids, real = features[f"{prefix}input_ids"], features[f"{prefix}attention_mask"].bool()
    mask = features.get(f"{prefix}instruction_mask", torch.zeros_like(ids))
    return sorted((row[of].tolist(), own[of].tolist()) for row, own, of in zip(ids, mask, real, strict=True))


def encoded(encode, texts: list[str], model: SentenceTransformer, **kwargs) -> list[tuple[list[int], list[int]]]:
    with batches_of(model) as seen:
        encode(texts, batch_size=len(texts), **kwargs)
    (features,) = seen
    return tokens(features)


@pytest.mark.parametrize(
    ("recipe", "prompts"),
    [*(("mean", name) for name in PROMPTS), ("llara", "the recipe's"), ("llara-release", "the recipe's")],
)
def test_each_column_is_as_the_model_encodes_it(llm, tmp_path, recipe, prompts):
    model = model_with(llm, recipe, prompts)
    columns = ["anchor", "positive", "negative_1", "negative_2"]
    data = {
        name: Dataset.from_dict({column: [f"{column} {name} {text}" for text in TEXTS] for column in of})
        for name, of in (("docs", columns), ("topics", columns[:3]))
    }
    args = LLMEmbedTrainingArguments(str(tmp_path), stage=2, report_to=[], use_cpu=True)
    trainer = LLMEmbedTrainer(model, args, data, tasks=[DOCS, TOPICS])
    mixed = [{**row, "dataset_name": name} for name, rows in data.items() for row in rows]
    for rows in (mixed, mixed[:3], mixed[3:]):
        batch = trainer.data_collator(rows)
        for column in columns:
            texts = {name: [r[column] for r in rows if r["dataset_name"] == name and column in r] for name in data}
            side = model.encode_query if column == "anchor" else model.encode_document
            expected = encoded(side, texts["docs"], model) if texts["docs"] else []
            if texts["topics"]:
                expected += encoded(model.encode, texts["topics"], model, prompt_name="topics")
            if any(texts.values()):
                found = tokens(batch, f"{column}_")
                assert [row for row in found if row in expected] == sorted(expected), column
    assert model.prompts["docs"] == model.prompts["query"]


@pytest.mark.parametrize("prompts", PROMPTS)
def test_evaluation_encodes_as_the_model_does(llm, prompts):
    """Of a task that the model knows, of one that it does not know, and of documents."""
    model = model_with(llm, "mean", prompts)
    model.prompts["Moods"] = "the moods: "
    encoder = PromptedEncoder(model, "name", "revision")

    def found(task: str, side: PromptType | None) -> list[tuple[list[int], list[int]]]:
        metadata = TaskMetadata.model_construct(name=task, prompt=None, type="Retrieval" if side else "STS")
        how = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default", "prompt_type": side}
        return encoded(lambda texts, **kwargs: encoder.encode([{"text": texts}], **how, **kwargs), TEXTS, model)

    for task in ("Moods", "Other"):
        assert found(task, PromptType.document) == encoded(model.encode_document, TEXTS, model)
    assert found("Moods", None) == encoded(model.encode, TEXTS, model, prompt_name="Moods")
    assert found("Moods", PromptType.query) == encoded(model.encode_query, TEXTS, model, prompt_name="Moods")
    assert found("Other", PromptType.query) == encoded(model.encode_query, TEXTS, model)
    similar = "similarity" if "similarity" in model.prompts else None
    assert found("Other", None) == encoded(model.encode, TEXTS, model, prompt_name=similar)


def test_a_document_prompt_in_a_model_of_stock_modules(llm, tmp_path):
    """Its first step is the loss of the vectors that encode_query and encode_document give."""
    backbone = LLMBackbone(llm)
    model = SentenceTransformer(modules=[backbone, Pooling(backbone.get_embedding_dimension())]).eval()
    model.prompts = {"query": "Question: ", "document": "Passage: "}
    rows = Dataset.from_dict({"anchor": ["a cat", "two dogs"], "positive": ["it sat", "they bark"]})
    args = LLMEmbedTrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = LLMEmbedTrainer(model, args, {"docs": rows}, tasks=[DOCS])
    batch = trainer.data_collator([{**row, "dataset_name": "docs"} for row in rows])
    with torch.no_grad():
        loss = trainer.compute_loss(model, batch)
    queries, documents = model.encode_query(rows["anchor"][:]), model.encode_document(rows["positive"][:])
    scores = model.similarity(queries, documents) / 0.02
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(scores, torch.arange(2)).item(), abs=1e-4)
