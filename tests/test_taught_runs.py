"""Teaching in a configuration: from raw texts to a student that searches its teacher's index."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CORPUS, train_tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, StaticEmbedding
from test_stages import DDP, run

from st_llm_embed import build_model
from st_llm_embed.files import read_json
from st_llm_embed.hub import check, save_sealed
from st_llm_embed.teaching import Teacher
from st_llm_embed.training import train_stages
from st_llm_embed.training.plan import describe_run
from st_llm_embed.training.run_folder import last_checkpoint
from st_llm_embed.training.stage_data import read_data
from st_llm_embed.training.taught_data import width_of
from st_llm_embed.trust import load_trusted

WORDS = " ".join(CORPUS).split()
QUIET = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "lr_scheduler_type": "linear"}


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(3, 12))) for _ in range(count)]


def write_lines(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A bag of words of 12 dimensions."""
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[StaticEmbedding(train_tokenizer(), embedding_dim=12), Normalize()])
    folder = tmp_path_factory.mktemp("teacher") / "bag"
    model.prompts = {"query": "ask: ", "document": ""}
    model.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def settings(llm, teacher, tmp_path) -> dict:
    pairs = [{"anchor": a, "positive": b} for a, b in zip(texts(24), texts(24, 1), strict=True)]
    return {
        "output": str(tmp_path / "run"),
        "model": {"base": llm, "recipe": "mean", "max_seq_length": 64},
        "arguments": {**QUIET, "per_device_train_batch_size": 8},
        "data": {
            "find": {
                "read": "from_columns",
                "source": write_lines(tmp_path / "pairs.jsonl", pairs),
                "instruction": "Find it",
            },
            "read": {
                "read": "from_texts",
                "source": write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts(160, 2)]),
            },
        },
        "stages": [
            {
                "name": "distil",
                "data": ["read", "find"],
                "teach": {"teacher": teacher, "sample": 200},
                "arguments": {"max_steps": 3, "save_steps": 2, "score_weight": 0.2},
            }
        ],
    }


def test_a_student_learns_from_texts_and_pairs_and_keeps_its_projection(settings, teacher, tmp_path):
    """A later stage, contrastive and by LoRA, goes on in the same space; killed and started again, it is the same."""
    settings["stages"] += [
        {
            "name": "both",
            "data": ["find"],
            "model": {"lora": {"r": 2, "target_modules": "all-linear"}},
            "teach": {"teacher": teacher},
            "arguments": {"max_steps": 2, "spread_weight": 0.1},
        },
        {"name": "contrastive", "data": ["find"], "arguments": {"max_steps": 1}},
    ]
    settings["seal"] = {"merge": True}
    plan, vectors = describe_run(settings), tmp_path / "run" / "vectors"
    assert f"taught by {teacher}, whose vectors lie in {vectors}: 12 dimensions of 208 texts" in plan
    assert "begins with a projection into that space, fitted to 200 of them" in plan
    sealed = train_stages(settings)
    student, of_teacher = SentenceTransformer(str(sealed)), SentenceTransformer(teacher)
    assert [type(module) for module in student][-2:] == [Dense, Normalize]
    assert of_teacher.similarity(student.encode_query(["cat"]), of_teacher.encode_document(["dog"])).shape == (1, 1)
    first = SentenceTransformer(str(tmp_path / "run" / "1-distil" / "model"), trust_remote_code=True)
    new = texts(30, 5)
    matched = float(first.similarity_pairwise(first.encode(new), of_teacher.encode(new)).mean())
    assert matched > 0.3, "two hundred texts tell as much of a random bag of words"
    log = read_json(Path(last_checkpoint(tmp_path / "run" / "2-both")) / "trainer_state.json")["log_history"]
    assert {"distill", "contrastive", "spread"} <= log[0].keys() and "scores" not in log[0]
    written = {file: file.stat().st_mtime_ns for file in vectors.glob("*.npy")}
    # Killed in the first stage, after its last checkpoint but one.
    folder = tmp_path / "run" / "1-distil"
    (folder / "model").rename(tmp_path / "whole")
    (folder / "checkpoint-3").rename(tmp_path / "checkpoint-3")
    for later in ("2-both", "3-contrastive"):
        (tmp_path / "run" / later).rename(tmp_path / later)
    train_stages(settings)
    for name, tensor in first.state_dict().items():
        again = SentenceTransformer(str(folder / "model"), trust_remote_code=True).state_dict()[name]
        torch.testing.assert_close(again, tensor)
    assert {file: file.stat().st_mtime_ns for file in vectors.glob("*.npy")} == written, "none is computed twice"


def test_vectors_made_elsewhere_lie_in_files_beside_the_texts(settings, teacher, tmp_path):
    of_teacher = SentenceTransformer(teacher)
    for column, rows in {"anchor": texts(24), "positive": texts(24, 1)}.items():
        encode = of_teacher.encode_query if column == "anchor" else of_teacher.encode_document
        np.save(tmp_path / f"{column}.npy", encode(rows))
    settings["data"]["find"]["teacher_embeddings"] = {c: str(tmp_path / f"{c}.npy") for c in ("anchor", "positive")}
    stage = settings["stages"][0]
    stage |= {"data": ["find"], "teach": {"sample": 48}}
    del settings["data"]["read"]
    brought = SentenceTransformer(str(train_stages(settings)), trust_remote_code=True)
    del settings["data"]["find"]["teacher_embeddings"]
    stage["teach"]["teacher"] = teacher
    settings["output"] += "-asked"
    asked = SentenceTransformer(str(train_stages(settings)), trust_remote_code=True)
    torch.testing.assert_close(asked.encode(texts(3)), brought.encode(texts(3)))
    stage["teach"]["sample"] = 40
    with pytest.raises(ValueError, match="stages.distil.teach.sample was 48 and is 40. That is done already"):
        train_stages(settings)


def teach(**settings):
    return lambda run, _: run["stages"][0]["teach"].update(settings)


def another_stage(**settings):
    return lambda run, teacher: run["stages"].append(
        {**run["stages"][0], "name": "again", "teach": {"teacher": teacher, **settings}}
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (teach(projection=False), "a teacher of 12 dimensions, and the model has 32"),
        (teach(instructions=True), "without a place for a task's"),
        (teach(truncate_dim=13), "truncate_dim=13, and the teacher's vectors 12"),
        (teach(sample=5), "sample: has the value 5. It takes 10 or more"),
        (lambda s, t: s["stages"][0]["teach"].pop("teacher"), "has a teach without a teacher, and .* no vectors"),
        (lambda s, t: s["stages"][0].pop("teach"), "score_weight=0.2 has no effect: there is no teacher"),
        (lambda s, t: s["stages"][0]["arguments"].update(distill_weight=0, score_weight=0), "score_weight are 0"),
        (lambda s, t: s.update(model={"load": t}), "which is the student"),
        (another_stage(projection=True), "stages.again: .*the model is in that of .*which it would leave"),
        (lambda s, t: s["data"]["find"].update(teacher_embeddings={"positive": f"{t}/none.npy"}), "none.npy"),
        (
            lambda s, t: s["data"]["find"].update(teacher_embeddings={"anchor": "a.npy"}, mine={"teacher": t}),
            "has teacher_embeddings, and mine, whose negatives",
        ),
        (lambda s, t: s.update(vectors=s["data"]["read"]["source"]), "vectors: "),
        (teach(projection=False, refit=True), "has refit: true, and no stage has made a projection"),
        (lambda s, t: s["data"]["read"].update(mine={"teacher": t}), "mine finds negatives of pairs"),
        (lambda s, t: s["data"]["read"].update(kind="sts", instruction="Compare"), "'documents', are called 'text'"),
    ],
)
def test_what_cannot_be_taught_is_refused_before_anything_is_written(settings, teacher, tmp_path, change, message):
    change(settings, teacher)
    with pytest.raises((ValueError, OSError), match=message):
        train_stages(settings)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_a_stage_that_goes_on_is_the_same(settings, teacher, tmp_path):
    own = shutil.copytree(teacher, tmp_path / "own")
    settings["stages"][0]["teach"]["teacher"] = str(own)
    train_stages(settings)
    folder = tmp_path / "run" / "1-distil"
    (folder / "model").rename(tmp_path / "whole")
    other = SentenceTransformer(modules=[StaticEmbedding(train_tokenizer(), embedding_dim=12), Normalize()])
    shutil.rmtree(own)
    other.save_pretrained(str(own))
    with pytest.raises(ValueError, match=r"stages.distil.teach: has the teacher own \(revision .*began with own"):
        train_stages(settings)


def test_first_dimensions_of_a_teacher_are_a_space_too(settings, teacher, tmp_path):
    settings["stages"][0]["teach"]["truncate_dim"] = 8
    settings["seal"] = True
    sealed = Path(train_stages(settings))
    assert "first 8 dimensions of the space of `bag`" in (sealed / "README.md").read_text()
    assert check(sealed, teacher).cosines.keys() == {"query", "document"}
    another = save_sealed(build_model(settings["model"]["base"], "mean"), tmp_path / "another")
    with pytest.raises(RuntimeError, match="is not its teacher, with which .* that is bag, revision"):
        check(sealed, another)


def test_repeated_texts_are_not_held_out_of_themselves(settings, tmp_path, caplog):
    """Thirty texts in hundreds of rows: what is held out was not fitted to."""
    rows = [{"anchor": a, "positive": b} for a in texts(15) for b in texts(15, 1)]
    settings["data"]["find"]["source"] = write_lines(tmp_path / "pairs.jsonl", rows)
    settings["stages"][0] |= {"data": ["find"], "arguments": {"max_steps": 1, "contrastive_weight": 0}}
    train_stages(settings)
    found = re.search(r"mean cosine (-?[\d.]+) on (\d+) texts held out of (\d+)", caplog.text)
    assert float(found[1]) < 0.9 and (found[2], found[3]) == ("3", "30")


def test_the_width_of_a_teacher_is_in_its_settings(llm, tmp_path, teacher):
    assert width_of(Path(llm)) == 32
    for recipe in ("mean", "nv-embed", "llara"):
        build_model(llm, recipe).save_pretrained(str(tmp_path / recipe))
        assert width_of(tmp_path / recipe) == 32
    model = SentenceTransformer(modules=[*build_model(llm, "mean"), Dense(32, 20)])
    model.save_pretrained(str(tmp_path / "dense"))
    assert width_of(tmp_path / "dense") == 20
    SentenceTransformer(modules=[build_model(llm, "mean")[0], Pooling(32, ("mean", "max"))]).save_pretrained(
        str(tmp_path / "two")
    )
    SentenceTransformer(teacher, truncate_dim=5).save_pretrained(str(tmp_path / "short"))
    assert width_of(tmp_path / "two") is None and width_of(tmp_path / "short") is None
    (tmp_path / "none").mkdir()
    assert width_of(tmp_path / "none") is None and width_of(Path(teacher)) is None  # it has to be loaded


@pytest.mark.slow
def test_two_processes_learn_what_one_does(settings, tmp_path):
    """On gloo, half the batch each, scores over the documents of both; texts alone, and pairs with the contrastive
    loss; mini-batches that are embedded twice."""
    settings["arguments"] |= {"optim": "sgd", "learning_rate": 1e-2, "gather_across_devices": True}
    settings["arguments"] |= {"mini_batch_size": 3, "max_grad_norm": 0}
    settings["stages"][0]["arguments"] = {"max_steps": 5, "score_weight": 0.5, "save_steps": 5}
    settings["vectors"] = str(tmp_path / "vectors")
    losses, weights = [], []
    for processes in (1, 2):
        settings["output"] = str(tmp_path / f"with-{processes}")
        settings["arguments"]["per_device_train_batch_size"] = 8 // processes
        how = ["-m", "st_llm_embed"] if processes == 1 else DDP
        losses.append(run(settings, tmp_path / f"config-{processes}.yaml", how)["1-distil"])
        model = SentenceTransformer(str(tmp_path / f"with-{processes}" / "1-distil" / "model"), trust_remote_code=True)
        weights.append(model.state_dict())
    assert len(losses[0]) == 5 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-6, rtol=1e-4)


def test_a_latent_attention_model_gets_a_stock_twin(settings, llm, tmp_path):
    """Which needs no code of its own; and a teacher with a place for instructions gets the tasks'."""
    teacher = build_model(llm, "nv-embed", num_latents=4)
    teacher.prompts = {"query": "Instruct: Answer\nQuery: "}
    teacher.save_pretrained(str(tmp_path / "latent"))
    stage = settings["stages"][0]
    stage["teach"] = {"teacher": str(tmp_path / "latent"), "sample": 60, "refit": True, "train_projection": True}
    settings["seal"] = True
    sealed = Path(train_stages(settings))
    assert not list(sealed.glob("*.py"))
    types = [module["type"].rpartition(".")[2] for module in read_json(sealed / "modules.json")]
    assert types == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert read_json(sealed / "reference.json")["teacher"]["name"] == "latent"
    card = (sealed / "README.md").read_text()
    assert "in the space of `latent` (revision " in card and "`teacher='latent'`" in card
    checked = check(sealed, tmp_path / "latent")
    assert checked.cosines.keys() == {"query", "document"} and all(0 < c <= 1 for c in checked.cosines.values())
    assert checked.difference < 1e-5
    rows, task = read_data("find", settings["data"]["find"])
    encoded = Teacher(load_trusted(tmp_path / "latent"), tmp_path / "run" / "vectors").encode(rows, task)
    expected = teacher.encode(texts(24)[:3], prompt="Instruct: Find it\nQuery: ")
    np.testing.assert_allclose(encoded["anchor"].take(np.arange(3)), expected, atol=1e-5)
    np.testing.assert_allclose(encoded["positive"].take(np.arange(3)), teacher.encode(texts(24, 1)[:3]), atol=1e-5)
    build_model(llm, "last-token").save_pretrained(str(tmp_path / "other"))
    with pytest.raises(RuntimeError, match="does not load in a process"):  # it is not its teacher, but another form
        check(sealed, tmp_path / "other")
