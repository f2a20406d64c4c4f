"""What a stage's settings say is what its trainer does: LoRA's numbers, losses, dev data, the base's LM head."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import save_llm
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import Dense, Pooling
from transformers import AutoTokenizer, BertConfig, BertModel

from st_llm_embed import LLMEmbedTrainer, build_model
from st_llm_embed.data import load_corpus, load_rows
from st_llm_embed.hub import save_sealed
from st_llm_embed.mining import mine_negatives
from st_llm_embed.recipes import RECIPES
from st_llm_embed.training import stages, train_stages
from st_llm_embed.training.plan import describe_run
from st_llm_embed.trust import load_any

ROWS = [{"anchor": f"how {i}?", "positive": f"so {i}", "negative_1": f"no {i}"} for i in range(8)]


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_llm(tmp_path / "llm")
    save_llm(tmp_path / "untied", tie_word_embeddings=False)
    for name, rows in (("train", ROWS), ("dev", ROWS[:4])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("documents.jsonl").write_text(json.dumps({"text": "One cat.\n\nTwo dogs.\n\nA fox."}) + "\n")
    read = {"read": "from_columns", "negatives": ["negative_1"], "instruction": "Find it"}
    return {
        "output": "run",
        "model": {"base": "llm", "recipe": "mean", "max_seq_length": 32},
        "arguments": {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3},
        "data": {
            "docs": {**read, "source": "train.jsonl"},
            "dev": {**read, "source": "dev.jsonl"},
            "texts": {"read": "consecutive_texts", "documents": "documents.jsonl"},
        },
        "stages": [{"name": "one", "data": ["docs"]}],
    }


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that a run makes, the rehearsals' too."""
    made = []
    make = stages._trainer
    monkeypatch.setattr(stages, "_trainer", lambda *arguments: made.append(make(*arguments)) or made[-1])
    return made


@pytest.mark.parametrize("recipe", ["mean", "nv-embed"])
def test_loras_numbers_are_those_that_are_said(settings, recipe):
    settings["model"] |= {"recipe": recipe, "lora": {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj"]}}
    model = SentenceTransformer(str(train_stages(settings)), trust_remote_code=True)
    config = model.transformers_model.peft_config["default"]
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (3, 12, {"q_proj"})
    assert config.lora_dropout == (0.1 if recipe == "nv-embed" else 0.0)  # the recipe's, where it has one


def test_unknown_numbers_of_lora_are_refused(llm):
    for name, message in (
        ("lora_alfa", "Did you mean 'lora_alpha'"),
        ("layers_to_transform", "use model.add_adapter"),
    ):
        with pytest.raises(ValueError, match=f"lora has the argument '{name}'.*{message}"):
            build_model(llm, lora={name: 3})
    assert build_model(llm, lora={}).transformers_model.peft_config["default"].r == 16  # the recipe's


def test_matryoshka_is_around_the_contrastive_loss(settings, trainers):
    settings["stages"][0]["loss"] = {"matryoshka_dims": [32, 8]}
    settings["arguments"]["temperature"] = 0.1
    train_stages(settings)
    loss = trainers[-1].loss
    assert isinstance(loss, MatryoshkaLoss) and list(loss.matryoshka_dims) == [32, 8]
    assert loss.loss.scale == pytest.approx(10)
    losses = [row["loss"] for row in trainers[-1].state.log_history if "train_loss" not in row and "loss" in row]
    assert trainers[-1].state.global_step == 2 and all(torch.isfinite(torch.tensor(losses)))


def test_the_best_model_by_dev_data_is_kept_and_the_stage_stops_early(settings, trainers):
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    arguments = {**evaluation, "max_steps": 30, "learning_rate": 10.0}  # which only makes it worse
    settings["stages"][0] |= {"eval_data": ["dev"], "early_stopping_patience": 2, "arguments": arguments}
    train_stages(settings)
    state = trainers[-1].state
    assert state.global_step < 30
    losses = [row["eval_dev_loss"] for row in state.log_history if "eval_dev_loss" in row]
    assert len(losses) == state.global_step and state.best_metric == pytest.approx(min(losses))


def test_dev_data_leave_no_prompt_in_the_model(settings):
    settings["data"]["dev"]["instruction"] = "Something else"
    arguments = {"eval_strategy": "steps", "eval_steps": 1}
    settings["stages"][0] |= {"eval_data": ["dev"], "arguments": arguments}
    model = SentenceTransformer(str(train_stages(settings)), trust_remote_code=True)
    assert model.prompts["query"] == "Instruct: Find it\nQuery: " and "dev" not in model.prompts


def test_pretext_stages_have_dev_data_too(settings, trainers):
    settings["model"]["recipe"] = "llara"
    arguments = {"eval_strategy": "steps", "eval_steps": 1}
    settings["stages"][0] |= {"data": ["texts"], "eval_data": ["texts"], "arguments": arguments}
    train_stages(settings)
    assert [row for row in trainers[-1].state.log_history if "eval_loss" in row]


def test_an_untied_llm_is_adapted_by_its_own_lm_head(settings, trainers):
    settings["model"] |= {"base": "untied", "recipe": "llara"}
    settings["stages"][0] |= {"data": ["texts"]}
    with pytest.raises(ValueError, match="does not tie its LM head .*lm_head: base}"):
        train_stages(settings)
    settings["stages"][0]["loss"] = {"lm_head": "base"}
    train_stages(settings)
    loss = trainers[-1].loss
    assert loss.lm_head.weight.data_ptr() != trainers[-1].model[0].model.get_input_embeddings().weight.data_ptr()
    assert not loss.lm_head.weight.requires_grad


OWN = {
    "nv-embed": ({"num_latents": 4, "head_dim": 4, "num_heads": 2, "lora": {"r": 2}}, "LatentAttentionPooling"),
    "llara": ({"query_length": 20, "document_length": 24, "lora": {"r": 2, "lora_alpha": 3}}, "PromptTokenPooling"),
    "llara-release": ({"max_seq_length": 128, "lora": True}, "PromptTokenPooling"),
    "mean": ({"include_prompt": False, "window": "keep"}, "Pooling"),
    "last-token": ({"attention": "bidirectional"}, "Pooling"),
    "weightedmean": ({"num_layers": 1}, "Pooling"),
    "multi-vector": ({"token_dim": 8, "skiplist_words": ["."]}, "Dense"),
    "sparse": ({"pooling_strategy": "sum"}, "Dense"),
}


@pytest.mark.parametrize("recipe", OWN)
def test_each_recipe_with_settings_of_its_own(settings, trainers, recipe):
    assert OWN.keys() == RECIPES.keys()
    own, pooling = OWN[recipe]
    settings["model"] = {"base": "llm", "recipe": recipe, "max_seq_length": 48, **own}
    model = load_any(train_stages(settings))
    assert trainers[-1].state.global_step == 2 and type(model[1]).__name__ == pooling
    said = {key: value for module in model for key, value in module.get_config_dict().items()}
    said["token_dim"] = model.get_embedding_dimension()
    for name, value in settings["model"].items():
        if name in ("base", "recipe"):
            continue
        if name == "lora":
            config = model.transformers_model.peft_config["default"]
            numbers = {**RECIPES[recipe].lora, **(value if isinstance(value, dict) else {})}
            assert {key: getattr(config, key) for key in numbers} == numbers
        elif name == "num_layers":
            assert model.transformers_model.config.num_hidden_layers == value
        else:
            assert (model.max_seq_length if name == "max_seq_length" else said[name]) == value


def texts_of(trainer: LLMEmbedTrainer, column: str) -> list[str]:
    """The first batch's texts with their prompts, as the model gets them."""
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer.processing_class.batch_decode(batch[f"{column}_input_ids"], skip_special_tokens=True)


def test_documents_have_a_prompt_of_their_own(settings, trainers):
    settings["data"]["docs"]["document_prompt"] = "passage: "
    model = SentenceTransformer(str(train_stages(settings)), trust_remote_code=True)
    assert all(text.startswith("Instruct: Find it\nQuery: how") for text in texts_of(trainers[-1], "anchor"))
    for column in ("positive", "negative_1"):
        assert all(text.startswith("passage: ") for text in texts_of(trainers[-1], column))
    assert model.prompts["document"] == model.prompts["docs-document"] == "passage: "
    torch.testing.assert_close(
        model.encode_document("so 1", convert_to_tensor=True), model.encode("passage: so 1", convert_to_tensor=True)
    )


def test_negatives_are_mined_inside(settings, trainers):
    """By a folder's model, and by the stage before; once."""
    build_model("llm", recipe="mean").save_pretrained("teacher")
    Path("corpus.csv").write_text("headline,body\n" + "".join(f"news {i},some text {i}\n" for i in range(9)))
    pairs = {"read": "from_columns", "source": "train.jsonl", "instruction": "Find it"}
    mine = {"num_negatives": 2, "relative_margin": None, "corpus": "corpus.csv"}
    mine["corpus_columns"] = {"title": "headline", "text": "body"}
    settings["data"] = {
        "first": {**pairs, "mine": {**mine, "teacher": "./teacher"}},
        "second": {**pairs, "mine": {"num_negatives": 2, "relative_margin": None, "teacher": "one"}},
    }
    settings["stages"] = [
        {"name": "one", "data": ["first"], "arguments": {"stage": 2}},
        {"name": "two", "data": ["first", "second"], "arguments": {"stage": 2}},
    ]
    last = train_stages(settings)
    assert {"positive", "negative_1", "negative_2"} <= set(trainers[-1].train_dataset["second"].column_names)
    rows = [json.loads(line) for line in Path("run/mined/first/train.jsonl").read_text().splitlines()]
    expected, report, _ = mine_negatives(
        load_rows("train.jsonl").select_columns(["anchor", "positive"]),
        SentenceTransformer("teacher", trust_remote_code=True),
        load_corpus("corpus.csv", mine["corpus_columns"]),
        num_negatives=2,
        relative_margin=None,
    )
    assert rows == expected.to_list() and report.documents == 17
    assert any(row["negative_1"].startswith("news ") for row in rows)
    written = {file: file.stat().st_mtime_ns for file in Path("run/mined").rglob("[!.]*") if file.is_file()}
    last.rename(last.with_name("before"))
    assert train_stages(settings) == last
    assert written == {file: file.stat().st_mtime_ns for file in Path("run/mined").rglob("[!.]*") if file.is_file()}
    assert f"second ({len(rows)} rows)" in (last / "README.md").read_text()


def test_a_stage_has_texts_of_its_own_length(settings, trainers):
    settings["data"]["docs"]["instruction"] = "Find it, and more, and more"
    settings["stages"] = [
        {"name": "short", "data": ["docs"]},
        {"name": "long", "data": ["docs"], "model": {"max_seq_length": 40, "query_length": 24}},
        {"name": "again", "data": ["docs"]},
    ]
    last = train_stages(settings)
    trained = {Path(made.args.output_dir).name: made.model for made in trainers if made.state.global_step}
    lengths = {name: (model.max_seq_length, model[0].query_length) for name, model in trained.items()}
    assert lengths["1-short"] == lengths["3-again"] == (32, None) and lengths["2-long"] == (40, 24)
    assert SentenceTransformer(str(last), trust_remote_code=True).max_seq_length == 32


def test_from_full_training_to_lora_and_back(settings):
    """Each stage goes on from the vectors that the one before had; what is not trained stays as it is."""
    settings["arguments"] |= {"learning_rate": 1e-2}
    settings["stages"] = [
        {"name": "full", "data": ["docs"]},
        {"name": "lora", "data": ["docs"], "model": {"lora": {"r": 2, "lora_dropout": 0.0}}},
        {"name": "wider", "data": ["docs"], "model": {"lora": {"r": 4}}, "arguments": {"learning_rate": 0.0}},
        {"name": "still", "data": ["docs"], "arguments": {"learning_rate": 0.0}},
    ]
    last = train_stages(settings)
    folders = [Path("run", name, "model") for name in ("1-full", "2-lora", "3-wider", "4-still")]
    full, lora, wider, still = (SentenceTransformer(str(folder), trust_remote_code=True) for folder in folders)
    assert (full[0]._has_adapter(), lora[0]._has_adapter(), still[0]._has_adapter()) == (False, True, False)
    assert wider.transformers_model.peft_config["default"].r == 4
    trained = full.transformers_model.layers[0].self_attn.q_proj.weight
    kept = lora.transformers_model.layers[0].self_attn.q_proj.base_layer.weight
    untrained = build_model("llm", recipe="mean").transformers_model.layers[0].self_attn.q_proj.weight
    assert torch.equal(trained, kept) and not torch.equal(trained, untrained)
    vectors = [model.encode(["how 1?", "so 2"], convert_to_tensor=True) for model in (full, lora, wider, still)]
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-4)
    torch.testing.assert_close(vectors[1], vectors[2], atol=1e-5, rtol=0)
    torch.testing.assert_close(vectors[1], vectors[3], atol=1e-5, rtol=0)
    last.rename(last.with_name("before"))
    again = SentenceTransformer(str(train_stages(settings)), trust_remote_code=True)
    torch.testing.assert_close(again.encode(["how 1?", "so 2"], convert_to_tensor=True), vectors[3])


def test_a_trained_model_begins_as_it_is(settings):
    """One of this package sealed, one with an adapter, and any other of sentence-transformers, with its Dense."""
    still = {"learning_rate": 0.0}
    settings["model"] |= {"recipe": "nv-embed", "num_latents": 4}
    save_sealed(SentenceTransformer(str(train_stages(settings)), trust_remote_code=True), "sealed")
    adapted = build_model("llm", recipe="mean", lora={"r": 2})
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained("adapted")
    BertModel(BertConfig(vocab_size=700, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        "bert"
    )
    tokenizer = AutoTokenizer.from_pretrained("llm")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained("bert")
    parts = Transformer("bert"), Pooling(8, "max"), Dense(8, 5)
    SentenceTransformer(modules=list(parts), prompts={"query": "ask: ", "document": ""}).save_pretrained("other")
    for number, (folder, changes) in enumerate(
        [("sealed", {}), ("adapted", {}), ("other", {}), ("other", {"lora": {"r": 2}}), ("adapted", {"lora": False})]
    ):
        before = SentenceTransformer(folder, trust_remote_code=True)
        settings |= {"output": f"run-{number}", "model": {"load": f"./{folder}", **changes}}
        settings["stages"][0]["arguments"] = still
        after = SentenceTransformer(str(train_stages(settings)), trust_remote_code=True)
        assert [type(module).__name__ for module in after] == [type(module).__name__ for module in before]
        # "ask: " has no place for an instruction.
        prompt = "ask: " if folder == "other" else "Instruct: Find it\nQuery: "
        assert {**before.prompts, "docs": prompt, "query": prompt} == after.prompts
        has_lora = "lora" in changes and bool(changes["lora"]) or (folder == "adapted" and not changes)
        assert bool(getattr(after.transformers_model, "peft_config", None)) == has_lora
        texts = ["how 1?", "so 2"]
        torch.testing.assert_close(after.encode(texts), before.encode(texts), atol=1e-5, rtol=0)
        settings |= {"output": f"trained-{number}"}
        settings["stages"][0]["arguments"] = {"learning_rate": 1e-2}
        trained = SentenceTransformer(str(train_stages(settings)), trust_remote_code=True)
        assert abs(trained.encode(texts) - before.encode(texts)).max() > 1e-3
        if folder == "adapted" and not changes:  # its adapter is what was trained
            old, new = (dict(model.named_parameters()) for model in (before, trained))
            changed = {name for name in old if not torch.equal(old[name], new[name])}
            assert changed and all("lora_" in name for name in changed)


def test_a_run_ends_sealed_and_evaluated(settings):
    Path("beir/qrels").mkdir(parents=True)
    for name, key in (("corpus", "so"), ("queries", "how")):
        lines = [json.dumps({"_id": f"{key}{i}", "text": f"{key} {i}"}) for i in range(4)]
        Path(f"beir/{name}.jsonl").write_text("\n".join(lines))
    for split in ("dev", "test"):
        Path(f"beir/qrels/{split}.tsv").write_text("q\td\ts\n" + "".join(f"how{i}\tso{i}\t1\n" for i in range(4)))
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    settings["stages"][0] |= {"eval_tasks": ["beir"], "early_stopping_patience": 2, "arguments": arguments}
    settings |= {
        "name": "Our little model",
        "seal": {"license": "mit"},
        "evaluate": {"tasks": ["beir"], "batch_size": 4},
    }
    sealed = train_stages(settings)
    assert sealed == Path("run/sealed")
    model = SentenceTransformer(str(sealed))  # without consent: it is stock
    card = (sealed / "README.md").read_text()
    assert "# Our little model" in card and "license: mit" in card and model.prompts["docs"]
    assert "ndcg_at_10" in next(Path("run/results").rglob("results.md")).read_text()
    state = json.loads(next(Path("run/1-one").glob("checkpoint-3/trainer_state.json")).read_text())
    assert [row for row in state["log_history"] if "eval_beir_ndcg_at_10" in row] and state["best_metric"] is not None
    seconds = (sealed / "modules.json").stat().st_mtime_ns
    assert train_stages(settings) == sealed and (sealed / "modules.json").stat().st_mtime_ns == seconds


def test_the_spread_is_in_the_loss(settings, trainers):
    settings["arguments"]["spread_weight"] = 0.5
    train_stages(settings)
    assert trainers[-1].loss.spread_weight == 0.5


def test_a_run_goes_on_with_other_settings(settings, caplog):
    """What leaves the finished stages true; the rest is refused, and said."""
    settings["stages"] = [{"name": "one", "data": ["docs"], "arguments": {"save_steps": 1}}]
    train_stages(settings)
    more = copy.deepcopy(settings)
    more["stages"][0]["arguments"]["save_steps"] = 5
    more["arguments"]["logging_steps"] = 1
    more["data"]["more"] = more["data"]["docs"]
    more["stages"].append({"name": "two", "data": ["more"], "arguments": {"max_steps": 4, "save_steps": 1}})
    more["name"] = "Our model"
    before = Path("run/1-one/model/modules.json").stat().st_mtime_ns
    second = train_stages(more)
    assert second == Path("run/2-two/model") and Path("run/1-one/model/modules.json").stat().st_mtime_ns == before
    assert "stages.one.arguments.save_steps was 1 and is 5" in caplog.text and "stages.two is new" in caplog.text
    # A stage that is under way: a smaller batch, other steps.
    for step in (3, 4):
        shutil.rmtree(f"run/2-two/checkpoint-{step}")
    second.rename(second.with_name("before"))
    more["stages"][1]["arguments"] |= {"per_device_train_batch_size": 2, "max_steps": 6}
    state = json.loads((train_stages(more).parent / "checkpoint-6/trainer_state.json").read_text())
    assert state["global_step"] == 6 and state["max_steps"] == 6
    for path, value, message in (
        ("seed", 1, "seed was 0 and is 1"),
        ("model.max_seq_length", 16, "stages.one.model.max_seq_length was 32 and is 16"),
        ("data.docs.instruction", "x", "data.docs.instruction was 'Find it' and is 'x'"),
        ("stages.one.arguments.learning_rate", 1, "stages.one.arguments.learning_rate was 0.001 and is 1"),
        ("stages.one.name", "other", "stages began with one, two, and begin now with other, two"),
        ("stages", more["stages"][:1], "stages began with one, two, and begin now with one"),
    ):
        with pytest.raises(ValueError, match=f"holds a run of another configuration: .*{message}"):
            train_stages(more, {path: value})


def test_paths_are_relative_to_the_file(settings, tmp_path, monkeypatch):
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert (
        train_stages("../run.yaml", {"stages.one.arguments": {"max_steps": 1}}).resolve()
        == tmp_path / "run/1-one/model"
    )
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("data", ["csv", "columns", "title", "tsv", "hub rows"])
def test_tables_as_people_have_them(settings, trainers, data):
    lines = [f"how {i}?{{0}}Title{i}{{0}}so {i}" for i in range(8)]
    text = "\n".join(["question{0}headline{0}answer", *lines])
    Path("t.csv").write_text(text.format(","))
    Path("t.tsv").write_text(text.format("\t"))
    load_rows("t.csv").save_to_disk("t")
    renamed = {"columns": {"anchor": "question", "positive": "answer"}}
    read = {
        "csv": {"read": "from_columns", "source": "t.csv", "anchor": "question", "positive": "answer"},
        "columns": {"read": "from_columns", "source": "t.csv", **renamed},
        "title": {"read": "from_columns", "source": "t.csv", "title": "headline", **renamed},
        "tsv": {"read": "from_columns", "source": "t.tsv", **renamed},
        "hub rows": {"read": "load_from_disk", "dataset_path": "t", "columns": {**renamed["columns"]}},
    }
    settings["data"]["docs"] = {**read[data], "instruction": "Find it"}
    if data == "hub rows":
        load_rows("t.csv").remove_columns("headline").save_to_disk("u")
        settings["data"]["docs"]["dataset_path"] = "u"
    train_stages(settings)
    assert all("how" in text for text in texts_of(trainers[-1], "anchor"))
    assert all(text.startswith("Title" if data == "title" else "so") for text in texts_of(trainers[-1], "positive"))


def test_stages_of_unlike_parts_are_rehearsed_and_resumed(settings, capsys):
    """What the last stage's model is made of is not what the finished one left."""
    settings["stages"] = [
        {"name": "full", "data": ["docs"]},
        {"name": "lora", "data": ["docs"], "model": {"lora": {"r": 2}}},
        {"name": "last", "data": ["docs"]},
    ]
    last = train_stages(settings)
    expected = SentenceTransformer(str(last), trust_remote_code=True).encode(["how 1?"])
    for folder in (last.parent, last.parents[1] / "2-lora"):
        shutil.rmtree(folder)
    assert "is finished" in describe_run(settings)
    again = SentenceTransformer(str(train_stages(settings)), trust_remote_code=True)
    torch.testing.assert_close(again.encode(["how 1?"]), expected)


def test_what_was_sealed_or_mined_by_other_settings_is_made_anew(settings):
    settings["seal"] = True
    settings["arguments"]["per_device_train_batch_size"] = 2
    settings["data"]["docs"] |= {"negatives": [], "mine": {"teacher": "./teacher", "num_negatives": 1}}
    build_model("llm", recipe="mean").save_pretrained("teacher")
    train_stages(settings)
    mined = Path("run/mined/docs/report.json")
    assert json.loads(mined.read_text())["settings"]["mine"]["num_negatives"] == 1
    shutil.rmtree("run/1-one")
    settings["data"]["docs"]["mine"]["num_negatives"] = 2
    sealed = train_stages(settings)
    assert json.loads(mined.read_text())["settings"]["mine"]["num_negatives"] == 2
    first = SentenceTransformer(str(sealed)).encode("how 1?")
    settings["stages"].append({"name": "two", "data": ["docs"], "arguments": {"learning_rate": 0.1}})
    (sealed.parent / ".sealed-killed").mkdir()
    second = SentenceTransformer(str(train_stages(settings)))
    last = SentenceTransformer("run/2-two/model", trust_remote_code=True)
    assert abs(second.encode("how 1?") - first).max() > 1e-3
    torch.testing.assert_close(second.encode("how 1?"), last.encode("how 1?"))
    assert not list(Path("run").glob(".sealed-*"))
    settings["name"] = "Another name"
    assert "# Another name" in (train_stages(settings) / "README.md").read_text()


def test_an_output_that_is_ones_own_folder_is_refused(settings, tmp_path):
    Path("config.yaml").write_text(yaml.safe_dump({**settings, "output": "."}))
    for given in ("config.yaml", {**settings, "output": "."}):
        with pytest.raises(ValueError, match="holds (config.yaml, which the run would|something that is no run)"):
            train_stages(given)


def test_tokens_are_not_told(settings, caplog):
    settings["arguments"] |= {"push_to_hub": False}
    train_stages(settings)
    settings["stages"].append({"name": "two", "data": ["docs"]})
    settings["model"]["model_kwargs"] = {"token": "hf_secret"}
    with pytest.raises(ValueError, match="stages.one.model.model_kwargs was None") as error:
        train_stages(settings)
    assert "hf_secret" not in str(error.value) + caplog.text


def test_settings_at_their_defaults_are_no_change(settings):
    last = train_stages(settings)
    settings["arguments"] |= {"weight_decay": 0.0, "stage": 1}
    settings["model"] |= {"lora": False, "base": str(Path("llm").resolve())}
    assert train_stages(settings) == last


@pytest.mark.parametrize(("epochs", "accumulation"), [(3, 3), (0.25, 1), (2.5, 4), (1.25, 20)])
def test_the_plan_counts_steps_as_the_host_does(settings, trainers, epochs, accumulation):
    arguments = {"num_train_epochs": epochs, "gradient_accumulation_steps": accumulation}
    settings["arguments"] = {**arguments, "per_device_train_batch_size": 1}
    plan = describe_run(settings)
    train_stages(settings)
    assert f"  {trainers[-1].state.global_step} steps ({epochs:g} epochs)" in plan
