"""Vectors that are cut and kept in fewer bits: figures by a naive search, ranges, the card, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from datasets import Dataset
from hub_server import card_errors
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings

from st_llm_embed import build_model
from st_llm_embed.cli import main
from st_llm_embed.encoding import CorpusEncoding, ModelEncoder
from st_llm_embed.encoding.ranges import RANGES
from st_llm_embed.evaluation import PromptedEncoder, evaluate, evaluate_compressed
from st_llm_embed.evaluation.compressed_encoder import RESCORED, CompressedEncoder, bytes_of
from st_llm_embed.evaluation.compression import Form
from st_llm_embed.evaluation.evaluate import find_model
from st_llm_embed.hub import save_sealed
from st_llm_embed.hub.card import put_section
from st_llm_embed.hub.teacher import name_teacher
from st_llm_embed.training import train_stages

WORDS = "how do I parse the command line a cat sat on mat seven dogs barking at moon fox jumped over them".split()
QUERIES, DOCUMENTS = 12, 150
DIMS, PRECISIONS = [32, 12], ["float32", "float16", "int8", "binary", "ubinary"]


def text(*seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, 6))


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A retrieval set, larger than what is rescored, and pairs with scores."""
    root = tmp_path_factory.mktemp("data")
    write(root / "docs" / "corpus.jsonl", [{"_id": f"d{i}", "text": text(0, i)} for i in range(DOCUMENTS)])
    write(root / "docs" / "queries.jsonl", [{"_id": f"q{i}", "text": text(1, i)} for i in range(QUERIES)])
    judged = [f"q{i}\td{(7 * i + 11 * k) % DOCUMENTS}\t{2 - k % 2}" for i in range(QUERIES) for k in range(20)]
    (root / "docs" / "qrels").mkdir()
    (root / "docs" / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    pairs = [{"sentence1": text(2, i), "sentence2": text(3, i), "score": i % 6} for i in range(30)]
    write(root / "pairs" / "test.jsonl", pairs)
    return root


@pytest.fixture(scope="module")
def folder(llm, tmp_path_factory) -> Path:
    model = build_model(llm, "mean", max_seq_length=32)
    model.prompts["query"] = "Find: "
    return save_sealed(model, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def found(data, folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    return evaluate_compressed(folder, [data / "docs", data / "pairs"], output, dims=DIMS, precision=PRECISIONS)


def vectors_of(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    model = SentenceTransformer(str(folder))
    return (
        model.encode_query([text(1, i) for i in range(QUERIES)]),
        model.encode_document([text(0, i) for i in range(DOCUMENTS)]),
    )


def ranges_in(file: Path) -> dict[str, np.ndarray]:
    """As a user would read them."""
    return {width: np.array(rows) for width, rows in json.loads(file.read_text())["ranges"].items()}


def cut(vectors: np.ndarray, width: int) -> np.ndarray:
    return vectors[:, :width] / np.linalg.norm(vectors[:, :width], axis=1, keepdims=True)


def naive_scores(query: np.ndarray, documents: np.ndarray, precision: str) -> list[float]:
    """What ranks each document, by loops over numbers."""
    if not precision.endswith("binary"):
        low, high = documents.min(axis=0), documents.max(axis=0)
        steps = (high - low) / 255
        kept = low + (np.floor((documents - low) / steps).clip(0, 255) + 0.5) * steps
        kept = kept if precision == "int8" else documents.astype(precision).astype(np.float64)
        return [float(query @ own / np.linalg.norm(own)) for own in kept]
    alike = [sum((a > 0) == (b > 0) for a, b in zip(query, own, strict=True)) for own in documents]
    order = sorted(range(len(documents)), key=lambda i: -alike[i])  # of documents alike, the first
    exact = [sum(a if b > 0 else -a for a, b in zip(query, own, strict=True)) for own in documents]
    return [1000.0 + exact[i] if i in order[:RESCORED] else alike[i] for i in range(len(documents))]


def ndcg(scores: list[float], number: int) -> float:
    judged = {"q": {f"d{(7 * number + 11 * k) % DOCUMENTS}": 2 - k % 2 for k in range(20)}}
    run = {"q": {f"d{place}": float(score) for place, score in enumerate(scores)}}
    return pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10"}).evaluate(run)["q"]["ndcg_cut_10"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", DIMS)
def test_figures_are_those_of_a_naive_search(folder, found, width, precision):
    queries, documents = (cut(part, width) for part in vectors_of(folder))
    naive = [ndcg(naive_scores(query, documents, precision), number) for number, query in enumerate(queries)]
    kept = json.loads((folder_of(found, width, precision) / "queries" / "docs.json").read_text())["scores"]
    own = [kept["test"]["default"][f"q{number}"] for number in range(QUERIES)]
    np.testing.assert_allclose(own, naive, atol=1e-6)
    assert found.results[Form(width, precision)][0].get_score() == pytest.approx(np.mean(naive), abs=1e-4)


def test_binary_search_rescores_no_more_than_it_says(folder):
    """Or the figures would be those of a float32 query against all signs."""
    model = SentenceTransformer(str(folder))
    encoder = CompressedEncoder(PromptedEncoder(model, "tiny", "1"), 32, "binary")
    random = np.random.default_rng(0)
    queries, documents = (cut(random.normal(size=(count, 32)).astype(np.float32), 32) for count in (3, 500))
    scores = encoder.similarity(queries, np.where(documents > 0, np.float32(1), np.float32(-1))).numpy()
    for query, own in zip(queries, scores, strict=True):
        naive = naive_scores(query, documents, "binary")
        assert list(np.argsort(-own, kind="stable")) == list(np.argsort(-np.array(naive), kind="stable"))
        exact = np.argsort(-(query @ np.where(documents > 0, 1, -1).T), kind="stable")
        assert list(exact[:100]) != list(np.argsort(-own, kind="stable")[:100])


def folder_of(found, width: int, precision: str) -> Path:
    """mteb's folder of one form."""
    if (width, precision) == (DIMS[0], "float32"):
        return found.folder
    named = [file.parent.parent for file in found.folder.parent.rglob("queries/docs.json")]
    wanted = [folder for folder in named if f"dims_{width}" in folder.name and f"precision_{precision}" in folder.name]
    assert len(wanted) == 1, named
    return wanted[0]


def test_texts_are_encoded_once_and_results_kept(data, folder, tmp_path, monkeypatch):
    encoded = []
    for name in ("encode",):  # the others call it
        plain = getattr(SentenceTransformer, name)

        def noted(self, inputs, *args, plain=plain, **kwargs):
            encoded.extend([inputs] if isinstance(inputs, str) else inputs)
            return plain(self, inputs, *args, **kwargs)

        monkeypatch.setattr(SentenceTransformer, name, noted)
    sets = [data / "docs", data / "pairs"]
    first = evaluate_compressed(folder, sets, tmp_path, dims=DIMS, precision=["float32", "int8"])
    corpus = {text(0, i) for i in range(DOCUMENTS)}
    assert sum(one in corpus for one in encoded) == len(corpus) == len(corpus & set(encoded))
    plain_result = evaluate(folder, sets, tmp_path)
    pairs = zip(plain_result.results, first.results[Form(32, "float32")], strict=True)
    assert all(one.get_score() == pytest.approx(other.get_score(), abs=1e-5) for one, other in pairs)
    encoded.clear()
    again = evaluate_compressed(folder, sets, tmp_path, dims=DIMS, precision=["float32", "int8"])
    assert again.table == first.table and not corpus & set(encoded)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")], "the vectors are gone"


def test_the_table_says_what_is_kept_of_how_many_bytes(found):
    rows = [
        line.split(" | ")
        for line in found.table.splitlines()
        if line.startswith("| 12 |") or line.startswith("| 32 |")
    ]
    sizes = {(row[0].strip("| "), row[1]): row[2] for row in rows}
    assert sizes["32", "float32"] == "128" and sizes["12", "float16"] == "24" and sizes["12", "int8"] == "12"
    assert sizes["32", "binary"] == "4" and sizes["12", "ubinary"] == "2" == str(bytes_of(12, "binary"))
    whole, half = (found.results[Form(width, "float32")][0].get_score() for width in DIMS)
    assert next(row for row in rows if row[:2] == ["| 12", "float32"])[4] == f"{half / whole:.1%}"
    assert "names no fewer dimensions" in found.table and RANGES in found.table


def test_ranges_are_those_of_the_documents_and_go_with_the_model(data, folder, found, tmp_path, capsys):
    model = shutil.copytree(folder, tmp_path / "model")
    revision, teacher = find_model(model), name_teacher(model)
    command = ["evaluate", str(model), "--tasks", str(data / "docs"), "--output", str(tmp_path / "results")]
    assert main([*command, "--dims", "32", "12", "--precision", "int8", "ubinary", "--card"]) == 0
    assert "## Shorter vectors" in capsys.readouterr().out
    ranges = ranges_in(model / RANGES)
    for width in DIMS:
        documents = cut(vectors_of(folder)[1], width)
        np.testing.assert_allclose(ranges[str(width)], [documents.min(axis=0), documents.max(axis=0)], atol=1e-6)
    card = (model / "README.md").read_text()
    assert card.count("## Shorter vectors") == 1 and card.index("## Shorter vectors") < card.index("## Model Details")
    assert card_errors(card) == [] and "| 12 | int8 | 12 |" in card
    # The model is the one that it was, and another evaluation goes by its own ranges.
    assert find_model(model)[1] == revision[1] and name_teacher(model) == teacher
    again = evaluate_compressed(model, [data / "pairs"], tmp_path / "more", dims=[12], precision=["int8"])
    assert again.ranges == model / RANGES
    assert again.results[Form(12, "int8")][0].get_score() == found.results[Form(12, "int8")][1].get_score()
    loaded = SentenceTransformer(str(model))
    published = save_sealed(loaded, tmp_path / "published", ranges=model / RANGES)
    assert (published / RANGES).read_bytes() == (model / RANGES).read_bytes()
    assert (published / "README.md").read_text().count("## Shorter vectors") == 1


def test_a_corpus_is_kept_by_the_ranges_of_the_model(folder, found, llm, tmp_path):
    model = SentenceTransformer(str(folder))
    texts = [text(7, i) for i in range(30)]
    rows = Dataset.from_dict({"text": texts})
    options = {"precision": "int8", "ranges": found.ranges}
    CorpusEncoding(ModelEncoder(model), rows, tmp_path / "vectors", **options).run()
    expected = quantize_embeddings(model.encode_document(texts), "int8", ranges=ranges_in(found.ranges)["32"])
    difference = np.load(tmp_path / "vectors" / "000000.npy").astype(int) - expected
    assert abs(difference).max() <= 1 and (difference != 0).mean() < 0.01  # at an edge rounding decides
    np.testing.assert_allclose(np.load(tmp_path / "vectors" / "ranges.npy"), ranges_in(found.ranges)["32"], atol=1e-7)
    CorpusEncoding(ModelEncoder(model), rows, tmp_path / "vectors", **options).run()
    with pytest.raises(ValueError, match="was begun with ranges="):
        CorpusEncoding(ModelEncoder(model), rows, tmp_path / "vectors", precision="int8")
    write(tmp_path / "corpus.jsonl", [{"text": one} for one in texts])
    command = ["encode", str(folder), str(tmp_path / "corpus.jsonl"), "--output", str(tmp_path / "by-command")]
    assert main([*command, "--precision", "int8", "--ranges", str(found.ranges)]) == 0
    assert (np.load(tmp_path / "by-command" / "000000.npy") == np.load(tmp_path / "vectors" / "000000.npy")).all()


def test_other_ranges_are_refused(folder, found, llm, tmp_path):
    model, rows = SentenceTransformer(str(folder)), Dataset.from_dict({"text": ["a cat"]})
    other = build_model(llm, "last-token", max_seq_length=32)
    for encoder, options, error, message in (
        (ModelEncoder(other), {"ranges": found.ranges}, ValueError, "ranges of another model or prompt"),
        (ModelEncoder(model), {"ranges": tmp_path}, FileNotFoundError, "evaluate MODEL --precision int8 writes it"),
        (ModelEncoder(model), {"ranges": folder / "reference.json"}, ValueError, "has no ranges that st-llm-embed"),
        (ModelEncoder(model), {"ranges": found.ranges, "precision": "binary"}, ValueError, "precision='binary'"),
    ):
        with pytest.raises(error, match=message):
            CorpusEncoding(encoder, rows, tmp_path / "vectors", **{"precision": "int8", **options})
    model.truncate_dim = 12
    with pytest.raises(ValueError, match="another model or prompt"):
        CorpusEncoding(ModelEncoder(model), rows, tmp_path / "vectors", precision="int8", ranges=found.ranges)
    with pytest.raises(ValueError, match="ranges of another model or prompt"):
        save_sealed(other, tmp_path / "sealed", ranges=found.ranges)
    assert not (tmp_path / "vectors").exists() and not (tmp_path / "sealed").exists()


def test_what_cannot_be_is_refused_before_the_work(data, folder, llm, tmp_path, monkeypatch, capsys):
    sets = [data / "docs"]
    loads = pytest.MonkeyPatch()
    loads.setattr("st_llm_embed.evaluation.compression.load_encoder", None)
    for options, message in (
        (
            {"precision": ["int4"]},
            "precision='int4' is unknown. Valid values: float32, float16, int8, binary, ubinary",
        ),
        ({"precision": []}, "precision is empty"),
        ({"dims": [0]}, "dims=0 must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_compressed(folder, sets, tmp_path, **options)
    with pytest.raises(ValueError, match="none of the tasks has any"):
        evaluate_compressed(folder, [data / "pairs"], tmp_path, precision=["int8"])
    loads.undo()
    with pytest.raises(ValueError, match="dims=33 must be from 1 to 32, the model's dimensions"):
        evaluate_compressed(folder, sets, tmp_path, dims=[33])
    backbone, pooling, _ = build_model(llm, "mean")
    raw = SentenceTransformer(modules=[backbone, pooling], similarity_fn_name="dot")
    raw.save_pretrained(str(tmp_path / "raw"))
    with pytest.raises(ValueError, match="similarity_fn_name='dot'"):
        evaluate_compressed(tmp_path / "raw", sets, tmp_path, dims=[8])
    command = ["evaluate", str(folder), "--tasks", str(data / "docs")]
    for more, message in (
        (["--dims", "8", "--parity"], "are of one model"),
        (["--card"], "--card is of --dims or --precision"),
    ):
        assert main([*command, *more]) != 0
        assert message in capsys.readouterr().err
    assert main(["evaluate", str(folder), str(folder), "--tasks", str(data / "docs"), "--dims", "8"]) != 0


def test_a_section_of_a_card_takes_the_place_of_its_older_self(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# A model\n\n## Model Details\n\nx\n")
    put_section(card, "## Shorter vectors\n\none\n")
    put_section(card, "## Shorter vectors\n\ntwo\n")
    assert card.read_text() == "# A model\n\n## Shorter vectors\n\ntwo\n\n## Model Details\n\nx\n"
    card.write_text("# A model\n\n## Shorter vectors\n\none\n")
    put_section(card, "## Shorter vectors\n\n\\1 two")
    assert card.read_text() == "# A model\n\n## Shorter vectors\n\n\\1 two\n\n"


def test_a_run_has_the_table_in_its_card(data, llm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("train.jsonl"), [{"anchor": f"how {i}?", "positive": f"so {i}"} for i in range(8)])
    settings = {
        "output": "run",
        "model": {"base": llm, "recipe": "mean", "max_seq_length": 32},
        "data": {"docs": {"read": "from_columns", "source": "train.jsonl", "instruction": "Find it"}},
        "arguments": {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1e-3},
        "stages": [{"name": "one", "data": ["docs"], "loss": {"matryoshka_dims": [32, 16]}}],
        "seal": True,
        "evaluate": {"tasks": [str(data / "docs")], "dims": [16], "precision": ["float32", "int8"]},
    }
    sealed = train_stages(settings)
    card = (sealed / "README.md").read_text()
    assert "Trained for 32, 16 dimensions." in card and "| 16 | int8 | 16 |" in card
    assert ranges_in(sealed / RANGES)["16"].shape == (2, 16)
    settings["evaluate"]["precision"] = ["int7"]
    with pytest.raises(ValueError, match="precision='int7' is unknown"):
        train_stages({**settings, "output": "other"})
    assert not Path("other").exists()
