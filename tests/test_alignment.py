"""A student's projection into its teacher's space: the closed form against least squares, and what it gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CORPUS, train_tokenizer
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, StaticEmbedding
from torch import nn

from st_llm_embed import build_model
from st_llm_embed.cli import main
from st_llm_embed.encoding.shards import column_hashes
from st_llm_embed.teaching import RidgeRegression, align

WORDS = " ".join(CORPUS).split()


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(3, 12))) for _ in range(count)]


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_closed_form_is_the_least_squares_solution(offset):
    """Of rows that come in parts, with means far from zero as an LLM's are, for several penalties."""
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 7)) * random.uniform(0.1, 3, size=7) + offset
    y = x @ random.normal(size=(7, 4)) + random.normal(size=(200, 4)) + 5
    regression = RidgeRegression(7, 4)
    for start, end in ((0, 1), (1, 60), (60, 60), (60, 200)):
        regression.add(x[start:end], y[start:end])
    centred = x - x.mean(axis=0)
    unit = (centred**2).sum() / 7
    for penalty, (weight, bias) in zip((1e-6, 0.1, 3.0), regression.solve((1e-6, 0.1, 3.0)), strict=True):
        rows = np.concatenate([centred, np.sqrt(penalty * unit) * np.eye(7)])
        expected, *_ = np.linalg.lstsq(rows, np.concatenate([y - y.mean(axis=0), np.zeros((7, 4))]), rcond=None)
        np.testing.assert_allclose(weight, expected.T, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(bias, y.mean(axis=0) - expected.T @ x.mean(axis=0), rtol=1e-6, atol=1e-5)


def test_what_is_no_regression_is_refused():
    regression = RidgeRegression(2, 1)
    with pytest.raises(ValueError, match=r"must be \(rows, 2\) and \(rows, 1\)"):
        regression.add(np.ones((3, 3)), np.ones((3, 1)))
    with pytest.raises(ValueError, match="finite numbers"):
        regression.add(np.full((1, 2), np.nan), np.ones((1, 1)))
    regression.add(np.ones((1, 2)), np.ones((1, 1)))
    with pytest.raises(ValueError, match="two rows or more, and there are 1"):
        next(regression.solve([1.0]))
    regression.add(np.ones((1, 2)), np.ones((1, 1)))  # all the same: a map to the mean
    (weight, bias), *_ = regression.solve([1.0])
    assert not weight.any() and bias == [1.0]
    with pytest.raises(ValueError, match="penalty 0 must be positive"):
        next(regression.solve([0]))


@pytest.fixture
def teacher():
    """A bag of words, wider than it needs to be, with a prompt for queries."""
    model = SentenceTransformer(modules=[StaticEmbedding(train_tokenizer(), embedding_dim=12), Normalize()])
    model.prompts = {"query": "ask: ", "document": ""}
    return model


def test_a_linear_teacher_is_met_exactly(llm):
    """What a map can do, the closed form does: the teacher is the student, mapped and turned."""
    student = build_model(llm, "mean")
    dense = Dense(32, 20, activation_function=nn.Identity())
    torch.nn.init.normal_(dense.linear.bias)
    teacher = SentenceTransformer(modules=[*list(student)[:-1], dense])  # its length is not 1: the cache makes it so
    aligned, alignment = align(student, teacher, documents=texts(400))
    assert alignment.cosine > 0.999 and alignment.texts == 360 and alignment.held_out == 40
    assert alignment.penalty == min(alignment.cosines) and len(alignment.cosines) == 9
    new = texts(20, seed=1)
    assert aligned.similarity_pairwise(aligned.encode(new), teacher.encode(new)).min() > 0.99
    assert [type(module).__name__ for module in aligned] == ["LLMBackbone", "Pooling", "Dense", "Normalize"]


def test_both_sides_are_encoded_under_their_own_prompts(llm, teacher, tmp_path):
    student = build_model(llm, "mean")
    student.prompts = {"query": "Instruct: Find it\nQuery: ", "document": "passage: "}
    queries, documents = texts(60), texts(90, seed=1)
    aligned, alignment = align(student, teacher, queries, documents, penalties=[0.01], cache_folder=tmp_path / "cache")
    pooled = SentenceTransformer(modules=list(student)[:-1], prompts=student.prompts)
    x = np.concatenate([pooled.encode_query(queries), pooled.encode_document(documents)])
    y = np.concatenate([teacher.encode_query(queries), teacher.encode_document(documents)])
    number = np.unique(column_hashes(Dataset.from_dict({"text": queries + documents})), return_inverse=True)[1]
    kept = np.flatnonzero(np.isin(number, np.random.default_rng(0).permutation(number.max() + 1)[:15]))
    fitted = np.setdiff1d(np.arange(150), kept)
    regression = RidgeRegression(32, 12)
    regression.add(x[fitted], y[fitted])
    ((weight, bias),) = regression.solve([0.01])
    np.testing.assert_allclose(aligned[2].linear.weight.detach(), weight, atol=1e-4)
    mapped = x @ weight.T + bias
    cosines = (mapped * y).sum(axis=1) / np.linalg.norm(mapped, axis=1)
    assert alignment.cosine == pytest.approx(cosines[kept].mean(), abs=1e-5)
    np.testing.assert_allclose(
        aligned.encode_query(queries), mapped[:60] / np.linalg.norm(mapped[:60], axis=1, keepdims=True), atol=1e-4
    )
    # The teacher's vectors are kept, and the student is as it was.
    teacher[0].forward = None
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 2 and len(student) == 3


def test_student_queries_search_the_teachers_index(llm, teacher, tmp_path, capsys):
    """By the command: a stock folder, whose card names the teacher, better than without the map."""
    build_model(llm, "mean").save_pretrained(str(tmp_path / "student"))
    teacher.save_pretrained(str(tmp_path / "teacher"))
    questions, documents = (tmp_path / name for name in ("questions.csv", "documents.jsonl"))
    questions.write_text("\n".join(["question", *(json.dumps(text) for text in texts(200))]))
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(300, seed=1)))
    command = ["align", str(tmp_path / "student"), str(tmp_path / "teacher"), str(tmp_path / "out"), "--name", "Small"]
    sides = ["--queries", str(questions), "--queries-columns", "text=question", "--documents", str(documents)]
    assert main([*command, *sides]) == 0, capsys.readouterr().err
    assert "Of 50 texts held out, the mean cosine with the teacher is 0." in capsys.readouterr().out
    student = SentenceTransformer(str(tmp_path / "out"))  # without consent: it is stock
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## A shared space" in card and "the space of `teacher`" in card and "# Small" in card
    unseen = texts(200, seed=2)
    scores = student.similarity(student.encode_query(unseen), teacher.encode_document(unseen))
    assert student.get_embedding_dimension() == 12 and scores.diagonal().mean() > scores.mean() + 0.05
    for arguments, message in (
        ([*command[:3], str(tmp_path / "x")], "There are no texts. Name --queries, --documents, or both"),
        ([*command[:3], str(tmp_path / "student"), *sides], "exists and is not an empty folder"),
        (
            [*command[:3], str(tmp_path / "x"), "--queries", str(questions)],
            "['question'], and no 'text'",
        ),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err and not Path(tmp_path / "x").exists()


def test_what_cannot_be_aligned_is_refused(llm, teacher):
    student = build_model(llm, "mean")
    for arguments, message in (
        ({"documents": texts(9)}, "There are 9 texts. A map between two spaces needs ten or more"),
        ({"documents": [*texts(20), " "]}, "Row 20 of data set 'documents' has an empty 'text'"),
        ({"documents": texts(20), "held_out": 1.0}, "held_out=1.0 must be a share"),
        ({"documents": texts(20), "penalties": [-1.0]}, "penalty -1.0 must be positive"),
        ({"documents": texts(20), "penalties": []}, "penalties must hold one"),
    ):
        with pytest.raises(ValueError, match=message):
            align(student, teacher, **arguments)
    with pytest.raises(ValueError, match="The teacher is the student"):
        align(student, student, documents=texts(20))
    with torch.no_grad():
        teacher[0].embedding.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="The model gives NaN or infinity"):
        align(student, teacher, documents=texts(20))
