"""What a teacher says, as a loss and through the trainer: against a literal computation, cached, blended, alone."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from conftest import CORPUS, train_tokenizer
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from torch import Tensor
from torch.nn.functional import cosine_similarity

from st_llm_embed import (
    DistillationLoss,
    InstructionContrastiveLoss,
    LLMEmbedTrainer,
    LLMEmbedTrainingArguments,
    Task,
    build_model,
)
from st_llm_embed.losses.distillation import Supervision
from st_llm_embed.losses.row_labels import NONE
from st_llm_embed.teaching import Teacher, TeacherEmbeddings, with_arrays

WORDS = " ".join(CORPUS).split()
WEIGHTS = {"distill_weight": 0.7, "score_weight": 0.3, "soft_label_weight": 0.2, "contrastive_weight": 0.5}
TEMPERATURES = {"score_temperature": 0.1, "soft_label_temperature": 2.0}


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(3, 12))) for _ in range(count)]


def divergence(wanted: list[Tensor], found: list[Tensor], temperature: float, given: float) -> Tensor:
    p = [math.exp(score / given) for score in wanted]
    q = [torch.exp(score / temperature) for score in found]
    p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
    return sum(a * (math.log(a) - b.log()) for a, b in zip(p, q, strict=True))


def literal(student: list[Tensor], teacher: list[Tensor], labels: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """Every part, text by text and row by row."""
    batch, columns = range(len(student[0])), range(len(student))
    there = [[int(labels[i, 2 + c]) != NONE for c in columns] for i in batch]

    def cosine(vectors: list[Tensor], *places: tuple[int, int]) -> Tensor:
        one, other = (vectors[c][i] for i, c in places)
        return cosine_similarity(one, other, dim=0)

    places = [(i, c) for i in batch for c in columns if there[i][c]]
    matches = [1 - cosine_similarity(student[c][i], teacher[c][i][: student[c].shape[1]], dim=0) for i, c in places]
    parts = {"distill": sum(matches) / len(matches)}
    of_queries, of_labels = [], []
    for i in batch:
        if not there[i][0]:
            continue
        documents = [(j, c) for j, c in places if (c > 0 if len(columns) > 1 else j != i)]
        wanted = [float(cosine(teacher, (i, 0), place)) for place in documents]
        found = [cosine(student, (i, 0), place) for place in documents]
        of_queries.append(divergence(wanted, found, TEMPERATURES["score_temperature"], 0.1))
        own = [c for c in columns if c and not scores[i, c - 1].isnan()] if len(columns) > 1 else []
        if len(own) > 1:
            found = [cosine(student, (i, 0), (i, c)) for c in own]
            of_labels.append(divergence([float(scores[i, c - 1]) for c in own], found, 0.1, 2.0))
    parts["scores"] = sum(of_queries) / len(of_queries)
    if of_labels:
        parts["soft_labels"] = sum(of_labels) / len(of_labels)
    return parts


@pytest.fixture
def batch():
    """Pairs with two negatives, of which one row lacks one, and two rows of a single text."""
    random = torch.Generator().manual_seed(0)
    student = [torch.randn(5, 6, generator=random, dtype=torch.float64).requires_grad_() for _ in range(4)]
    teacher = [torch.randn(5, 6, generator=random, dtype=torch.float64) for _ in range(4)]
    scores = torch.randn(5, 3, generator=random, dtype=torch.float64)
    numbers = torch.arange(20).reshape(5, 4)
    numbers[1, 3] = NONE
    numbers[3, 1:] = NONE  # a query alone
    numbers[4, [0, 2, 3]] = NONE  # a document alone
    scores[numbers[:, 1:] == NONE] = torch.nan
    labels = torch.cat([torch.tensor([[0, NONE]] * 3 + [[NONE, NONE]] * 2), numbers], dim=1)
    return student, teacher, labels, scores


@pytest.fixture
def model(llm):
    return build_model(llm, "mean")


def test_every_part_and_its_gradients_equal_the_literal_computation(model, batch):
    student, teacher, labels, scores = batch
    loss = DistillationLoss(model, InstructionContrastiveLoss(model, spread_weight=0.4), **WEIGHTS, **TEMPERATURES)
    value = loss.compute_loss_from_embeddings(student, Supervision(labels, teacher, scores))
    gradients = torch.autograd.grad(value, student)
    parts = loss.take_parts()
    assert list(parts) == ["distill", "scores", "soft_labels", "contrastive", "spread"] and not loss.take_parts()
    torch.testing.assert_close(sum(parts.values()), value.detach())
    expected = literal(student, teacher, labels, scores)
    for name, weight in zip(expected, WEIGHTS.values(), strict=False):
        torch.testing.assert_close(parts[name], weight * expected[name].detach(), rtol=1e-9, atol=1e-9)
    pairs = [column[:3] for column in student]  # the contrastive loss of the rows that are pairs, by itself
    contrastive = InstructionContrastiveLoss(model).compute_loss_from_embeddings(pairs, labels[:3])
    spread = loss.contrastive.crowding(student, loss_rows(labels, student))
    whole = sum(weight * expected[name] for name, weight in zip(expected, WEIGHTS.values(), strict=False))
    whole = whole + WEIGHTS["contrastive_weight"] * contrastive + 0.4 * spread
    torch.testing.assert_close(value, whole, rtol=1e-9, atol=1e-9)
    for gradient, literally in zip(gradients, torch.autograd.grad(whole, student), strict=True):
        torch.testing.assert_close(gradient, literally, rtol=1e-6, atol=1e-9)


def loss_rows(labels: Tensor, student: list[Tensor]):
    from st_llm_embed.losses.row_labels import RowLabels

    return RowLabels.unpack(labels, True, student[0])


def test_single_texts_are_compared_with_each_other(model, batch):
    student, teacher, _, _ = batch
    labels = torch.tensor([[NONE, NONE, i] for i in range(5)])
    loss = DistillationLoss(model, InstructionContrastiveLoss(model), score_weight=0.3, **TEMPERATURES)
    value = loss.compute_loss_from_embeddings(student[:1], Supervision(labels, teacher[:1], None))
    assert loss.take_parts().keys() == {"distill", "scores"}
    expected = literal(student[:1], teacher[:1], labels, torch.empty(5, 0))
    torch.testing.assert_close(value, expected["distill"] + 0.3 * expected["scores"])


def features(model, rows: list[list[str]], dim: int = 32, scores: bool = True) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(1)
    columns = [model.preprocess(column) for column in rows]
    for column in columns:
        column["teacher_embedding"] = torch.randn(len(rows[0]), dim, generator=random)
    if scores:
        columns[0]["soft_labels"] = torch.randn(len(rows[0]), len(rows) - 1, generator=random)
    return columns


@pytest.mark.parametrize("matryoshka", [False, True])
def test_the_gradient_cache_gives_the_plain_gradients(llm, matryoshka):
    rows = [texts(6, seed) for seed in range(3)]
    found = []
    for mini_batch_size in (None, 2):
        model = build_model(llm, "mean", model_kwargs={"dtype": "float64"}).double()
        contrastive = InstructionContrastiveLoss(model, mini_batch_size=mini_batch_size, spread_weight=0.1)
        loss = DistillationLoss(model, contrastive, **WEIGHTS)
        whole = MatryoshkaLoss(model, loss, [32, 16, 8]) if matryoshka else loss
        value = whole(features(model, rows), None)
        value.backward()
        parts = loss.take_parts()
        torch.testing.assert_close(sum(parts.values()), value.detach())
        found.append((value.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (plain, gradients), (cached, others) = found
    torch.testing.assert_close(cached, plain)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-9, rtol=1e-7)


def test_inside_matryoshka_the_teachers_first_dimensions_are_matched(model, batch):
    student, teacher, labels, scores = batch
    loss = DistillationLoss(model, InstructionContrastiveLoss(model), contrastive_weight=0)
    short = [column[:, :4] for column in student]
    value = loss.compute_loss_from_embeddings(short, Supervision(labels, teacher, None))
    torch.testing.assert_close(value, literal(short, teacher, labels, scores)["distill"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"distill_weight": -1}, "distill_weight=-1 must be 0 or more"),
        ({"distill_weight": 0, "contrastive_weight": 0}, "are all 0"),
        ({"score_temperature": 0}, "score_temperature=0 must be positive"),
    ],
)
def test_what_makes_no_sense_is_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationLoss(model, InstructionContrastiveLoss(model), **settings)


def test_features_that_do_not_fit_are_refused(model):
    rows = [texts(2), texts(2, 1), texts(2, 2)]
    loss = DistillationLoss(model, InstructionContrastiveLoss(model), soft_label_weight=1.0)
    columns = features(model, rows)
    del columns[1]["teacher_embedding"]
    with pytest.raises(ValueError, match="3 columns of texts have 2 of the teacher's vectors"):
        loss(columns)
    with pytest.raises(ValueError, match="vectors have 8 dimensions and the student's 32. Give .* a projection"):
        loss(features(model, rows, dim=8))
    columns = features(model, rows)
    columns[0]["soft_labels"] = columns[0]["soft_labels"][:, :1]
    with pytest.raises(ValueError, match=r"scores are \(2, 1\), and the rows have \(2, 2\) documents"):
        loss(columns)


@pytest.fixture
def teacher():
    """A bag of words as wide as the students here."""
    model = SentenceTransformer(modules=[StaticEmbedding(train_tokenizer(), embedding_dim=32), Normalize()])
    model.prompts = {"query": "ask: ", "document": ""}
    return model


FIND = Task("find", "Find it")
READ = Task("read", kind="documents")
ASK = Task("ask", "Answer")


def data(scores: bool = False) -> dict[str, Dataset]:
    pairs = {"anchor": texts(12), "positive": texts(12, 1), "negative_1": texts(12, 2), "negative_2": texts(12, 3)}
    if scores:
        pairs["scores"] = np.random.default_rng(0).normal(size=(12, 3)).tolist()
    return {
        "find": Dataset.from_dict(pairs),
        "read": Dataset.from_dict({"text": texts(12, 4)}),
        "ask": Dataset.from_dict({"anchor": texts(12, 5)}),
    }


def arguments(folder, **settings) -> LLMEmbedTrainingArguments:
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    return LLMEmbedTrainingArguments(str(folder), **{**quiet, "per_device_train_batch_size": 6, **settings})


@pytest.mark.parametrize("blended", [False, True])
def test_pairs_and_single_texts_are_taught_together(model, teacher, tmp_path, blended):
    """Each text's vector is the teacher's of that very text, under its own prompts, whatever rows come together."""
    args = arguments(tmp_path, blended=blended, score_weight=0.5, soft_label_weight=0.1, max_steps=4)
    rows = data(scores=True)
    tutor = Teacher(teacher, tmp_path / "vectors", shard_size=5)
    trainer = LLMEmbedTrainer(model, args, rows, tasks=[FIND, READ, ASK], teacher=tutor)
    assert isinstance(trainer.loss, DistillationLoss) and rows["find"].column_names[-1] == "scores"
    seen = set()
    for batch in trainer.get_train_dataloader():
        columns = [key.removesuffix("_input_ids") for key in batch if key.endswith("_input_ids")]
        assert len(columns) == (4 if blended or batch["dataset_name"] == "find" else 1)
        assert ("anchor_soft_labels" in batch) == (batch["dataset_name"] == "find" or blended)
        for place, column in enumerate(columns):
            for row, ids in enumerate(batch[f"{column}_input_ids"]):
                vector = batch[f"{column}_teacher_embedding"][row]
                if batch["label"][row, 2 + place] == NONE:
                    assert not vector.any()
                    continue
                text = model.tokenizer.decode(ids, skip_special_tokens=True)
                _, is_query, asked = text.partition("\nQuery: ")
                expected = teacher.encode_query(asked) if is_query else teacher.encode_document(text)
                np.testing.assert_allclose(vector, expected, atol=1e-6)
                seen.add((column, bool(is_query)))
    assert ("anchor", True) in seen and ("positive", False) in seen and ("negative_2", False) in seen
    trainer.train()
    logged = {key for row in trainer.state.log_history for key in row}
    assert {"distill", "scores", "contrastive"} <= logged
    assert {"find", "query", "ask"} <= set(model.prompts) and "read" not in model.prompts


def test_vectors_are_computed_once_and_may_come_in_columns_and_files(model, teacher, tmp_path, monkeypatch):
    rows = {"find": data()["find"]}
    tutor = Teacher(teacher, tmp_path / "vectors")
    encoded = tutor.encode(rows["find"], FIND)
    monkeypatch.setattr("st_llm_embed.encoding.cache.write_shard", None)  # nothing is written again
    of_teacher = LLMEmbedTrainer(model, arguments(tmp_path), rows, tasks=[FIND], teacher=tutor)
    for column, vectors in encoded.items():
        np.save(tmp_path / f"{column}.npy", vectors.take(np.arange(12)))
    brought = with_arrays(rows["find"], {column: tmp_path / f"{column}.npy" for column in encoded})
    in_lists = Dataset.from_list(brought.to_list())  # as JSON has them
    first = next(iter(of_teacher.get_train_dataloader()))
    turned = np.asfortranarray(np.load(tmp_path / "anchor.npy").astype(">f8"))
    np.save(tmp_path / "turned.npy", turned)  # by columns, as another machine has them
    files = {"anchor": tmp_path / "turned.npy", **{c: tmp_path / f"{c}.npy" for c in list(encoded)[1:]}}
    for given in (brought, in_lists, with_arrays(rows["find"], files)):
        trainer = LLMEmbedTrainer(model, arguments(tmp_path), {"find": given}, tasks=[FIND])
        pickle.loads(pickle.dumps(trainer.data_collator))  # for workers that are spawned
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch.keys() == first.keys()
        for key, value in first.items():
            torch.testing.assert_close(batch[key], value) if isinstance(value, Tensor) else None
    evaluated = trainer.evaluate({"find": in_lists})
    assert evaluated["eval_find_loss"] > 0


def with_column(values: list, column: str = "anchor_teacher_embedding") -> Dataset:
    return data()["find"].select_columns(["anchor", "positive"]).add_column(column, values)


def with_scores(scores: list[float]) -> Dataset:
    return data()["find"].add_column("scores", [scores] * 12)


@pytest.mark.parametrize(
    "rows, settings, message",
    [
        (with_column([[1.0] * 32] * 12), {}, r"vectors of a teacher in \['anchor_teacher_embedding'\]. Give each"),
        (
            with_column([[1.0] * 32] * 12).add_column("positive_teacher_embedding", [[1.0] * 8] * 12),
            {},
            "have 8 dimensions, and the model's 32. Give the model a projection",
        ),
        (
            with_column([[1.0] * 32] * 12).add_column("positive_teacher_embedding", [[math.nan] * 32] * 12),
            {},
            "row 0 of column 'positive_teacher_embedding' is not finite",
        ),
        (
            with_column([[1.0] * 32] * 12).add_column("positive_teacher_embedding", [[1.0] * 32] * 11 + [[1.0] * 31]),
            {},
            "Row 11 of column 'positive_teacher_embedding' has 31 dimensions, and row 0 has 32",
        ),
        (
            with_column([1.0] * 12).add_column("positive_teacher_embedding", [1.0] * 12),
            {},
            "A teacher's vectors are lists of floats",
        ),
        (
            with_column([[1.0] * 32] * 12),
            {"distill_weight": 0, "contrastive_weight": 1},
            "the loss does not read it. Give distill_weight",
        ),
        (data()["find"], {"soft_label_weight": 1.0}, "no data set has a column 'scores'"),
        (data(scores=True)["find"], {}, "has scores, which nothing reads. Say soft_label_weight"),
        (
            with_column([[1.0]] * 12, "scores"),
            {"soft_label_weight": 1.0},
            "one document in each row, whose score alone",
        ),
        (with_scores([1.0, 2.0]), {"soft_label_weight": 1.0}, "Expected a list of 3 numbers"),
        (with_scores([math.inf, 1.0, 2.0]), {"soft_label_weight": 1.0}, r"scores \[inf, 1.0, 2.0\]"),
        (data()["ask"], {}, "single texts, of which only a teacher's vectors say"),
        (data()["read"], {}, "has the column 'text' alone, and its task is of the kind 'retrieval'"),
        (data()["find"], {"distill_weight": 2.0}, "distill_weight=2.0 has no effect: there is no teacher"),
        (data()["find"], {"contrastive_weight": 0.0}, "contrastive_weight=0.0 has no effect: there is nothing"),
        (data()["find"], {"score_temperature": 0.1}, "score_temperature=0.1 has no effect: no scores are matched"),
    ],
)
def test_data_and_arguments_that_do_not_fit_are_refused(model, tmp_path, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        LLMEmbedTrainer(model, arguments(tmp_path, **settings), {"find": rows}, tasks=[FIND])


def test_a_teacher_that_does_not_fit_is_refused(model, teacher, tmp_path):
    rows = {"find": data()["find"]}
    with pytest.raises(ValueError, match="The teacher is the student"):
        LLMEmbedTrainer(model, arguments(tmp_path), rows, tasks=[FIND], teacher=Teacher(model, tmp_path / "v"))
    with pytest.raises(ValueError, match="have no place for a task's"):
        Teacher(teacher, tmp_path / "v", instructions=True)
    with pytest.raises(ValueError, match="with tasks="):
        LLMEmbedTrainer(model, arguments(tmp_path), rows["find"], teacher=Teacher(teacher, tmp_path / "v"))
    with pytest.raises(ValueError, match="the loss does not read it"):
        loss = InstructionContrastiveLoss(model)
        tutor = Teacher(teacher, tmp_path / "v")
        LLMEmbedTrainer(model, arguments(tmp_path), rows, loss=loss, tasks=[FIND], teacher=tutor)
    np.save(tmp_path / "short.npy", np.ones((3, 32)))
    with pytest.raises(ValueError, match=r"shape \(3, 32\), and must be \(12, dim\)"):
        with_arrays(rows["find"], {"anchor": tmp_path / "short.npy"})
    with pytest.raises(ValueError, match="There is no column 'text'"):
        with_arrays(rows["find"], {"text": tmp_path / "short.npy"})
    with pytest.raises(ValueError, match=r"takes a Teacher, which keeps the vectors: Teacher\(model, 'vectors'\)"):
        LLMEmbedTrainer(model, arguments(tmp_path), rows, tasks=[FIND], teacher=teacher)
    np.savez(tmp_path / "many.npz", np.ones((12, 32)))
    with pytest.raises(ValueError, match="many.npz is no .npy file of one array of floats"):
        with_arrays(rows["find"], {"anchor": tmp_path / "many.npz"})
    with pytest.raises(ValueError, match=r"single texts, and \['label'\] beside them, which nothing reads"):
        labelled = data()["read"].add_column("label", ["a"] * 12)
        tutor = Teacher(teacher, tmp_path / "untouched")
        LLMEmbedTrainer(model, arguments(tmp_path), {"read": labelled}, tasks=[READ], teacher=tutor)
    assert not (tmp_path / "untouched").exists(), "nothing is encoded for data that are refused"
    with pytest.raises(ValueError, match="kind 'documents' has none"):
        Task("read", "Read", kind="documents")


def test_looking_up_reads_what_is_asked(teacher, tmp_path):
    """In any order, over shards, with texts that many rows share."""
    rows = Dataset.from_dict({"text": [*texts(20), *texts(20)][::-1]})
    (vectors,) = Teacher(teacher, tmp_path, shard_size=7).encode(rows, READ).values()
    assert isinstance(vectors, TeacherEmbeddings) and (vectors.rows, vectors.dim) == (40, 32)
    assert sum(len(np.load(file)) for file in tmp_path.rglob("*.npy")) == 20
    places = np.array([39, 0, 17, 17, 5])
    np.testing.assert_allclose(vectors.take(places), teacher.encode_document(rows[places]["text"]), atol=1e-6)
