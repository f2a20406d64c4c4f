"""Training begins from embedding models as others publish them: their modules, prompts and templates are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import train_tokenizer
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from transformers import BertConfig, BertModel, PreTrainedConfig, Qwen3Config, Qwen3Model

from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, Task
from st_llm_embed.hub import save_sealed
from st_llm_embed.training import mined_data, stages, train_stages

WEB = "Given a web search query, retrieve relevant passages that answer the query"
DATA = {"read": "from_columns", "source": "train.jsonl", "negatives": ["negative_1"]}
ROWS = [{"anchor": f"how {i}?", "positive": f"so {i}", "negative_1": f"no {i}"} for i in range(8)]


def publish(folder: str, config: PreTrainedConfig, *rest: torch.nn.Module, **prompts: str) -> None:
    tokenizer = train_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left" if isinstance(config, Qwen3Config) else "right"
    (Qwen3Model if isinstance(config, Qwen3Config) else BertModel)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parts = [Transformer(folder, max_seq_length=64), *rest, Normalize()]
    SentenceTransformer(modules=parts, prompts=prompts).save_pretrained(folder)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """``qwen`` and ``bert``, made as Qwen3-Embedding and as an encoder with prompts and a Dense are."""
    monkeypatch.chdir(tmp_path)
    small = {"vocab_size": 700, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 16, "initializer_range": 0.2}
    qwen = Qwen3Config(**small, num_key_value_heads=1, head_dim=8, max_position_embeddings=128)
    publish("qwen", qwen, Pooling(16, "lasttoken"), query=f"Instruct: {WEB}\nQuery:", document="")
    publish("bert", BertConfig(**small), Pooling(16, "mean"), Dense(16, 8), query="query: ", document="passage: ")
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def token_ids(trainer: LLMEmbedTrainer, column: str, task: str) -> list[list[int]]:
    """Of the task's first four rows, as the model gets them in training."""
    batch = trainer.data_collator([{**row, "dataset_name": task} for row in ROWS[:4]])
    ids, mask = batch[f"{column}_input_ids"], batch[f"{column}_attention_mask"].bool()
    return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]


def configs(model: SentenceTransformer) -> list[tuple[str, dict]]:
    return [(type(module).__name__, module.get_config_dict()) for module in list(model)[1:]]


def test_a_qwen3_embedding_goes_through_a_run(here, monkeypatch, caplog):
    """Stages, mining, sealing and evaluation, each with the task's instruction in the model's template."""
    Path("beir/qrels").mkdir(parents=True)
    for name, key in (("corpus", "so"), ("queries", "how")):
        lines = [json.dumps({"_id": f"{key}{i}", "text": f"{key} {i}"}) for i in range(4)]
        Path(f"beir/{name}.jsonl").write_text("\n".join(lines))
    Path("beir/qrels/test.tsv").write_text("q\td\ts\n" + "".join(f"how{i}\tso{i}\t1\n" for i in range(4)))
    trainers, prompted = [], []
    make, mine = stages._trainer, mined_data.mine_negatives

    def mine_and_note(*args, **kwargs):
        prompted.append(kwargs["query_prompt"])
        return mine(*args, **kwargs)

    monkeypatch.setattr(stages, "_trainer", lambda *arguments: trainers.append(make(*arguments)) or trainers[-1])
    monkeypatch.setattr(mined_data, "mine_negatives", mine_and_note)
    last = train_stages(
        {
            "output": "run",
            "model": {"load": "./qwen"},
            "arguments": {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1e-2, "stage": 2},
            "data": {
                "beir": {**DATA, "instruction": "Find {it}"},
                "alike": {**DATA, "instruction": "Tell", "kind": "pair"},
                "own": {**DATA, "instruction": "Ask", "query_prompt": "Say, {instruction}: "},
                "mined": {
                    **{key: value for key, value in DATA.items() if key != "negatives"},
                    "instruction": "Mine",
                    "mine": {"teacher": "./qwen", "num_negatives": 1, "relative_margin": None},
                },
            },
            "stages": [{"name": "one", "data": ["beir", "own"]}, {"name": "two", "data": ["alike", "mined"]}],
            "seal": True,
            "evaluate": {"tasks": ["beir"]},
        }
    )
    prompts = {
        "beir": "Instruct: Find {it}\nQuery:",
        "alike": "Instruct: Tell\nQuery:",
        "own": "Say, Ask: ",
        "mined": "Instruct: Mine\nQuery:",
    }
    before, sealed = SentenceTransformer("qwen"), SentenceTransformer(str(last))
    # The last stage's first retrieval task is what encode_query does.
    assert sealed.prompts == {**prompts, "query": prompts["mined"], "document": ""}
    assert configs(sealed) == configs(before) and sealed[1].pooling_mode == "lasttoken"
    assert prompted == [prompts["mined"]]
    one, two = (next(made for made in reversed(trainers) if name in made.plan.tasks) for name in ("beir", "alike"))
    for trainer, task, columns in ((one, "beir", ["anchor"]), (one, "own", ["anchor"]), (two, "alike", ROWS[0])):
        for column in ROWS[0]:
            prompt = prompts[task] if column in columns else ""
            texts = [prompt + row[column] for row in ROWS[:4]]
            assert token_ids(trainer, column, task) == before.tokenizer(texts)["input_ids"]
    for name, prompt in prompts.items():
        torch.testing.assert_close(sealed.encode("how 1?", prompt_name=name), sealed.encode(prompt + "how 1?"))
    torch.testing.assert_close(sealed.encode_query("how 1?"), sealed.encode(prompts["mined"] + "how 1?"))
    assert abs(sealed.encode("how 1?") - before.encode("how 1?")).max() > 1e-3
    assert "`Instruct: Find {it}\\nQuery:`" in next(Path("run/results").rglob("results.md")).read_text()
    assert "are left out" not in caplog.text


def test_an_encoder_keeps_its_prompts_and_says_so_once(here, caplog):
    """In a run and in Python; what its prompts have no place for is named, and may be told."""
    settings = {
        "output": "run",
        "model": {"load": "./bert"},
        "arguments": {"per_device_train_batch_size": 4, "max_steps": 1, "stage": 2},
        "data": {
            "faq": {**DATA, "instruction": "Find it"},
            "more": {**DATA, "instruction": "Find more"},
            "alike": {**DATA, "instruction": "Tell", "kind": "pair"},
        },
        "stages": [{"name": "one", "data": ["faq", "more", "alike"]}, {"name": "two", "data": ["faq"]}],
        "seal": True,
    }
    before, after = SentenceTransformer("bert"), SentenceTransformer(str(train_stages(settings)))
    kept = {"faq": "query: ", "more": "query: ", "alike": ""}
    assert after.prompts == {**before.prompts, **kept} and configs(after) == configs(before)
    assert [type(module) for module in after] == [Transformer, Pooling, Dense, Normalize]
    assert caplog.text.count("The instructions of faq, more are left out: ") == 1
    assert "'query: ', which has no place for one. Fix: query_prompt='query: ' of the task" in caplog.text
    assert caplog.text.count("The instructions of alike are left out") == 1
    caplog.clear()

    args = LLMEmbedTrainingArguments("out", max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    rows = {name: Dataset.from_list(ROWS) for name in ("docs", "alike")}
    told = [
        Task("docs", "Find it", query_prompt="task: {instruction} | query: "),
        Task("alike", "Tell", "pair", query_prompt="query: "),
    ]
    trainer = LLMEmbedTrainer(before, args, rows, tasks=told)
    trainer.train()
    save_sealed(before, "sealed")
    again = SentenceTransformer("sealed")
    prompts = {"docs": "task: Find it | query: ", "query": "task: Find it | query: ", "alike": "query: "}
    assert again.prompts == {"document": "passage: ", **prompts} and configs(again) == configs(after)
    assert "are left out" not in caplog.text
    ids = again.tokenizer([prompts["docs"] + row["anchor"] for row in ROWS[:4]])["input_ids"]
    assert token_ids(trainer, "anchor", "docs") == ids
    torch.testing.assert_close(again.encode_query("how 1?"), again.encode(prompts["docs"] + "how 1?"))
    # A second stage finds the template that the first one left.
    LLMEmbedTrainer(again, args, {"new": rows["docs"]}, tasks=[Task("new", "Look")])
    assert again.prompts["new"] == again.prompts["query"] == "task: Look | query: "
    assert again.prompts["docs"] == prompts["docs"]
    with pytest.raises(ValueError, match="Task 'docs' has the prompt '{text}.*puts a prompt before the text"):
        LLMEmbedTrainer(again, args, rows, tasks=[Task("docs", "Find it", query_prompt="{text}?"), told[1]])
