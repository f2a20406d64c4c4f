"""Evaluation: local folders as mteb's tasks, saved prompts, independent figures, resume, parity, bad input."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
import subprocess
import sys
from math import log2

import mteb
import numpy as np
import pytest
import pytrec_eval
from hub_server import Repository, hub_server, online
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer

from st_llm_embed import Task, build_model
from st_llm_embed.cli import main
from st_llm_embed.evaluation import PromptedEncoder, evaluate, local_task, parity
from st_llm_embed.hub import save_sealed
from st_llm_embed.tasks import encoding_prompts

WORDS = "how do I parse the command line a cat sat on mat seven dogs barking at moon fox jumped over them".split()
TASKS = (
    Task("questions", "Find what answers the question"),
    Task("similar", "Find sentences that mean the same", "sts"),
)


def text(*seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, 6))


def lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(content.encode()))
    else:
        file.write_text(content)


def make_retrieval(folder, extra=()):
    lines(folder / "corpus.jsonl", ({"_id": f"d{i}", "title": "", "text": text(0, i)} for i in range(40)))
    lines(folder / "queries.jsonl.gz", ({"_id": f"q{i}", "text": text(1, i)} for i in range(12)))
    judged = [(f"q{i}", f"d{(7 * i + k) % 40}", 2 - k) for i in range(12) for k in range(3)]
    rows = "".join(f"{query}\t{document}\t{score}\n" for query, document, score in [*judged, *extra])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Eight data sets of five kinds."""
    root = tmp_path_factory.mktemp("data")
    for name in ("questions", "scifact"):
        make_retrieval(root / name)
    for name in ("similar", "sts13"):
        pairs = [{"sentence1": text(2, i), "sentence2": text(3, i), "score": i % 6} for i in range(30)]
        lines(root / name / "test.jsonl", pairs)
    pairs = [{"sentence1": text(4, i), "sentence2": text(5, i), "label": i % 2} for i in range(30)]
    lines(root / "mrpc" / "test.jsonl.gz", pairs)
    labelled = [{"text": text(6, i), "label": i % 3} for i in range(60)]
    for name in ("moods", "Banking77"):
        lines(root / name / "train.jsonl", labelled)
        lines(root / name / "test.jsonl", labelled[:30])
    lines(root / "topics" / "test.jsonl", labelled)
    return root


@pytest.fixture(scope="module")
def model_folder(llm, tmp_path_factory):
    """A sealed model with two tasks' prompts."""
    model = build_model(llm, "nv-embed", num_latents=8, head_dim=8)
    model.prompts.update(encoding_prompts(TASKS, model.prompts))
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model.save_pretrained(str(folder))
    return folder


def test_eight_local_tasks_of_five_kinds_give_the_same_twice(folders, model_folder, tmp_path, monkeypatch):
    sets = sorted(folders.iterdir())
    first = evaluate(model_folder, sets, tmp_path / "one", batch_size=8)
    again = evaluate(model_folder, sets, tmp_path / "two", batch_size=8)
    scores = {result.task_name: result.get_score() for result in first.results}
    assert scores == {result.task_name: result.get_score() for result in again.results}
    assert len(scores) == 8 and all(np.isfinite(score) for score in scores.values())
    kinds = {line.split(" | ")[1] for line in first.table.splitlines() if line.count(" | ") == 4}
    assert kinds - {"kind", "---"} == {"Retrieval", "STS", "PairClassification", "Classification", "Clustering"}
    assert (first.folder / "results.md").read_text() == first.table
    settings = json.loads((first.folder / "model_meta.json").read_text())
    assert settings["experiment_kwargs"] == {
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "max_seq_length": 512,
    }
    # What is there is not computed again.
    monkeypatch.setattr(PromptedEncoder, "encode", None)
    assert evaluate(model_folder, sets, tmp_path / "one").table == first.table


def test_retrieval_figure_is_that_of_pytrec_eval_and_of_the_formula(folders, model_folder, tmp_path):
    found = evaluate(model_folder, [folders / "questions"], tmp_path).results[0].get_score()
    model = SentenceTransformer(str(model_folder), trust_remote_code=True)
    queries = model.encode_query([text(1, i) for i in range(12)], prompt=model.prompts["questions"])
    scores = model.similarity(queries, model.encode_document([text(0, i) for i in range(40)])).numpy()
    judged = {f"q{i}": {f"d{(7 * i + k) % 40}": 2 - k for k in range(3)} for i in range(12)}
    run = {f"q{i}": {f"d{j}": float(score) for j, score in enumerate(row)} for i, row in enumerate(scores)}
    figures = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10"}).evaluate(run)
    assert found == pytest.approx(np.mean([own["ndcg_cut_10"] for own in figures.values()]), abs=1e-4)

    def dcg(gains):
        return sum(gain / log2(rank + 2) for rank, gain in enumerate(gains[:10]))

    by_hand = []
    for i, row in enumerate(scores):
        grades = judged[f"q{i}"]
        by_hand.append(dcg([grades.get(f"d{j}", 0) for j in np.argsort(-row)]) / dcg([2, 1, 0]))
    assert found == pytest.approx(np.mean(by_hand), abs=1e-4)


def beir_ndcg(model: SentenceTransformer, corpus: dict[str, str], queries: dict[str, str], judged: dict) -> float:
    """nDCG@10 as BEIR's own evaluation has it: ids that are the query's left out, judgements as they are."""
    asked = [query for query in queries if query in judged]
    scores = model.similarity(
        model.encode_query([queries[query] for query in asked], prompt=model.prompts["questions"]),
        model.encode_document(list(corpus.values())),
    ).tolist()
    run = {
        query: {document: score for document, score in zip(corpus, row, strict=True) if document != query}
        for query, row in zip(asked, scores, strict=True)
    }
    figures = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10"}).evaluate(run)
    return float(np.mean([own["ndcg_cut_10"] for own in figures.values()]))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_odd_retrieval_set_has_the_figure_of_beir(model_folder, tmp_path, suffix):
    """Missing documents, queries without a relevant one or without judgements, ids twice, null titles, empty texts."""
    folder = tmp_path / "questions"
    documents = [
        {"_id": i, "title": text(7, i) if i % 2 else None, "text": text(0, i) if i else ""} for i in range(40)
    ]
    lines(folder / f"corpus.jsonl{suffix}", [*documents, documents[5]])
    asked = [{"_id": f"q{i}", "title": "not read", "text": text(1, i) if i else ""} for i in range(12)]
    lines(folder / f"queries.jsonl{suffix}", [*asked, asked[4]])
    judged = {f"q{i}": {f"{(7 * i + k) % 40}": 2 - k for k in range(3)} for i in range(8)}
    judged["q0"]["gone"] = 3  # counts as not found
    judged["q8"] = {"1": 0, "2": 0}  # counts as 0
    judged["q99"] = {"1": 1}  # not asked
    rows = [
        f"{query}\t{document}\t{grade}\n" for query, grades in judged.items() for document, grade in grades.items()
    ]
    content = "\nquery-id\tcorpus-id\tscore\n" + "".join(rows)
    (folder / "qrels").mkdir()
    (folder / "qrels" / f"test.tsv{suffix}").write_bytes(
        gzip.compress(content.encode()) if suffix else content.encode()
    )
    corpus = {f"{row['_id']}": f"{row['title'] or ''} {row['text']}".strip() for row in documents}
    queries = {row["_id"]: row["text"] for row in asked}
    model = SentenceTransformer(str(model_folder), trust_remote_code=True)
    found = evaluate(model_folder, [folder], tmp_path / "results").results[0].get_score()
    assert found == pytest.approx(beir_ndcg(model, corpus, queries, judged), abs=1e-4)
    # With grades below 0 alone, which mean what 0 means, and on which pytrec_eval crashes.
    if not suffix:
        with (folder / "qrels" / "test.tsv").open("a") as file:
            file.writelines(f"q{i}\t{k}\t-{k}\n" for i in range(9, 12) for k in range(1, 3))
        nothing = {f"q{i}": {"1": 0, "2": 0} for i in range(9, 12)}
        found = evaluate(model_folder, [folder], tmp_path / "results").results[0].get_score()
        assert found == pytest.approx(beir_ndcg(model, corpus, queries, judged | nothing), abs=1e-4)


def test_one_id_for_two_texts_is_refused(tmp_path):
    folder = make_retrieval(tmp_path / "questions")
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d7", "text": "another"}\n')
    with pytest.raises(ValueError, match="corpus.jsonl has the id 'd7' for two texts, .* and 'another'. Fix"):
        local_task(folder).load_data()


@pytest.mark.parametrize("title", ["", "how do I parse"])
def test_a_query_that_is_a_document_is_no_answer_to_itself(model_folder, tmp_path, title):
    """ArguAna, Quora. Not where both files number their lines: there a query's answer may have its number."""
    documents = [{"_id": i, "title": title, "text": text(0, i)} for i in range(30)]
    corpus = {f"{i}": f"{title} {text(0, i)}".strip() for i in range(30)}
    model = SentenceTransformer(str(model_folder), trust_remote_code=True)

    def figure(name: str, queries: dict[str, str], judged: dict[str, dict[str, int]]) -> float:
        folder = tmp_path / name / "questions"
        lines(folder / "corpus.jsonl", documents)
        lines(folder / "queries.jsonl", [{"_id": query, "text": asked} for query, asked in queries.items()])
        (folder / "qrels").mkdir()
        rows = [f"{query}\t{document}\t1\n" for query, grades in judged.items() for document in grades]
        (folder / "qrels" / "test.tsv").write_text("".join(rows))
        return evaluate(model_folder, [folder], tmp_path / name / "results").results[0].get_score()

    judged = {f"{i}": {f"{i + 12}": 1} for i in range(12)}
    queries = {f"{i}": f" {text(0, i)}" for i in range(12)}  # in another spelling
    assert figure("own", queries, judged) == pytest.approx(beir_ndcg(model, corpus, queries, judged), abs=1e-4)
    numbered = {f"{i}": text(1, i) for i in range(12)}
    kept = {f"q{query}": asked for query, asked in numbered.items()}
    for name, pairs in {"same": {f"{i}": {f"{i}": 1} for i in range(12)}, "other": judged}.items():
        expected = beir_ndcg(model, corpus, kept, {f"q{query}": grades for query, grades in pairs.items()})
        assert expected > 0 and figure(name, numbered, pairs) == pytest.approx(expected, abs=1e-4)


def test_data_that_changed_have_new_figures_and_each_split_its_own(model_folder, tmp_path):
    """Corrected files, another folder of the same name, splits one after the other: all into one output."""

    def figure(folder, output="kept", split="test"):
        return evaluate(model_folder, [folder], tmp_path / output, split=split).results[0].get_score()

    pairs = [{"sentence1": text(2, i), "sentence2": text(3, i), "score": i % 6} for i in range(30)]
    turned = [{**row, "score": -row["score"]} for row in pairs]
    folder = tmp_path / "similar"
    lines(folder / "test.jsonl", pairs)
    first = figure(folder)
    lines(folder / "test.jsonl", turned)
    assert figure(folder) == figure(folder, "fresh") == pytest.approx(-first, abs=1e-4) != first
    lines(tmp_path / "elsewhere" / "similar" / "test.jsonl.gz", pairs)
    assert figure(tmp_path / "elsewhere" / "similar") == first
    assert figure(folder) == pytest.approx(-first, abs=1e-4)
    lines(folder / "dev.jsonl", pairs)
    figures = [figure(folder, split=split) for split in ("test", "dev", "test", "dev")]
    assert figures == pytest.approx([-first, first] * 2, abs=1e-4)
    retrieval = make_retrieval(tmp_path / "questions")
    before = figure(retrieval)
    for file in ("corpus.jsonl", "qrels/test.tsv"):
        rows = (retrieval / file).read_text().splitlines()
        (retrieval / file).write_text("\n".join(rows[:-9]) + "\n")
        assert figure(retrieval) == figure(retrieval, f"fresh {file}") != before


def test_another_version_of_this_package_computes_anew(model_folder, folders, tmp_path, monkeypatch):
    """It may read the same files otherwise."""
    evaluate(model_folder, [folders / "Banking77"], tmp_path)
    monkeypatch.setattr("st_llm_embed.evaluation.local_tasks.__version__", "another")
    encoded = []
    encode = PromptedEncoder.encode
    monkeypatch.setattr(
        PromptedEncoder, "encode", lambda self, *args, **kwargs: encoded.append(1) or encode(self, *args, **kwargs)
    )
    evaluate(model_folder, [folders / "Banking77"], tmp_path)
    assert encoded


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"test": [{"sentence1": "a", "sentence2": "b", "score": "1"}]}, "Line 1 of .*test.jsonl has '1' in 'score'"),
        (
            {"test": [{"sentence1": "a", "sentence2": "b", "score": 1}, {"sentence1": "a", "sentence2": None}]},
            "Line 2 of .*test.jsonl has None in 'sentence2', where text is expected",
        ),
        (
            {"test": [{"sentence1": "a", "sentence2": "b", "score": float("nan")}]},
            "Line 1 of .* has nan in 'score'. Scores are numbers",
        ),
        ({"test": [{"sentence1": "a", "sentence2": "b", "score": 1}] * 3}, r"test.jsonl has \[1\] alone in 'score'"),
        ({"test": [{"sentence1": "a", "sentence2": "b", "label": "1"}]}, "Line 1 of .* has '1' in 'label'"),
        ({"test": [{"text": "a", "label": "x"}, {"text": "b", "label": None}]}, "Line 2 of .* has None in 'label'"),
        ({"test": [{"text": "a", "label": ["x"]}]}, r"Line 1 of .* has \['x'\] in 'label'"),
        ({"test": [{"text": "a", "label": "x"}, {"text": 3, "label": "x"}]}, "Line 2 of .* has 3 in 'text'"),
        (
            {"test": [{"text": "a", "label": "x"}], "train": [{"text": "b", "label": 1}, {"text": "c", "label": 2}]},
            "has labels of text and of numbers",
        ),
        (
            {"test": [{"text": "a", "label": "x"}], "train": [{"text": "b", "label": "x"}]},
            r"train.jsonl has \['x'\] alone in 'label': there is nothing to tell apart",
        ),
    ],
)
def test_a_line_that_is_no_text_or_judgement_is_named_before_the_work(folders, tmp_path, files, message):
    for split, rows in files.items():
        lines(tmp_path / "set" / f"{split}.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "no model", [folders / "similar", tmp_path / "set"], tmp_path / "results")


def test_columns_that_a_task_does_not_read_may_hold_anything(tmp_path):
    rows = [{"text": f"a {i}", "label": i % 2, "id": i if i % 2 else "x", "meta": [None, {}][i % 2]} for i in range(4)]
    lines(tmp_path / "set" / "test.jsonl", rows)
    task = local_task(tmp_path / "set")
    task.load_data()
    assert task.dataset["default"]["test"].column_names == ["text", "label"]


def test_a_trainers_folder_is_evaluated_as_it_lies_there(folders, model_folder, tmp_path):
    """What the trainer left beside the model is not read, and names no other state of it."""
    results = [evaluate(model_folder, [folders / "similar"], tmp_path / "results")]
    shutil.copytree(model_folder, tmp_path / "tiny")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state_0.pth"):
        (tmp_path / "tiny" / name).write_bytes(b"not read")
    results.append(evaluate(tmp_path / "tiny", [folders / "similar"], tmp_path / "results"))
    assert results[0].folder == results[1].folder and results[0].table == results[1].table


def test_longer_texts_than_the_model_says_are_other_results(folders, model_folder, tmp_path):
    cut = evaluate(model_folder, [folders / "questions"], tmp_path, max_seq_length=20)
    whole = evaluate(model_folder, [folders / "questions"], tmp_path)
    assert cut.folder != whole.folder and "at most 20 tokens" in cut.table
    assert cut.results[0].get_score() != whole.results[0].get_score()
    for wrong in (0, 513):
        with pytest.raises(ValueError, match=f"max_seq_length={wrong} must be from 1 to 512"):
            evaluate(model_folder, [folders / "questions"], tmp_path, max_seq_length=wrong)


def test_a_hub_id_is_known_by_its_commit(folders, model_folder, tmp_path):
    model = SentenceTransformer(str(model_folder), trust_remote_code=True)
    save_sealed(model, tmp_path / "sealed")
    files = {str(f.relative_to(tmp_path / "sealed")): f for f in (tmp_path / "sealed").rglob("*") if f.is_file()}
    repository = Repository(private=False)
    commit = repository.commit("main", {name: file.read_bytes() for name, file in files.items()})
    command = ["evaluate", "org/tiny", "--tasks", str(folders / "similar"), "--output", str(tmp_path / "results")]
    with hub_server() as server:
        server.repositories["org/tiny"] = repository
        done = subprocess.run(
            [sys.executable, "-m", "st_llm_embed", *command],
            capture_output=True,
            text=True,
            env={**os.environ, **online(server, tmp_path / "home")},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"org/tiny ({commit})" in done.stdout
    (result,) = (tmp_path / "results").rglob("similar.json")
    assert commit in result.parts and "org__tiny" in result.parts
    here = evaluate(model_folder, [folders / "similar"], tmp_path / "here").results[0].get_score()
    assert json.loads(result.read_text())["scores"]["test"][0]["main_score"] == pytest.approx(here, abs=1e-4)


def test_another_state_precision_or_data_set_is_computed_anew(folders, model_folder, tmp_path):
    first = evaluate(model_folder, [folders / "similar"], tmp_path)
    assert evaluate(model_folder, [folders / "similar"], tmp_path, dtype="bfloat16").folder != first.folder
    copied = tmp_path / "similar"
    rows = [{"sentence1": text(9, i), "sentence2": text(3, i), "score": i % 6} for i in range(30)]
    lines(copied / "test.jsonl", rows)
    assert evaluate(model_folder, [copied], tmp_path).results[0].get_score() != first.results[0].get_score()
    model = SentenceTransformer(str(model_folder), trust_remote_code=True)
    model[1].latents.data.mul_(2)
    model.save_pretrained(str(tmp_path / "tiny"))
    assert evaluate(tmp_path / "tiny", [folders / "similar"], tmp_path).folder != first.folder


def test_which_prompt_a_task_gets(llm, folders):
    model = build_model(llm, "nv-embed", num_latents=8, head_dim=8)
    model.prompts.update(encoding_prompts(TASKS, model.prompts))
    encoder = PromptedEncoder(model, "m", "1")

    def prompts(name):
        task = local_task(folders / name) if (folders / name).is_dir() else mteb.get_task(name)
        return [encoder.prompt(task.metadata, side) for side in (PromptType.query, PromptType.document, None)]

    assert prompts("questions")[:2] == [TASKS[0].prompt, ""]
    assert prompts("similar")[2] == TASKS[1].prompt
    assert "scientific" in prompts("scifact")[0]  # this package's instruction
    assert "Instruct: " in prompts("STS13")[2]
    assert prompts("FiQA2018")[0].startswith("Instruct: Given a financial question")  # mteb's
    model.prompts = {"document": "passage: ", "sci-fact-document": "abstract: ", "questions-document": None}
    assert [prompts(name)[1] for name in ("scifact", "SciFact", "questions")] == ["abstract: ", "abstract: ", ""]
    assert prompts("FiQA2018")[1] == "passage: " and prompts("scifact")[0] == prompts("scifact")[2] == ""
    encoded = encoder.encode(
        [{"text": ["a cat"]}],
        task_metadata=local_task(folders / "scifact").metadata,
        hf_split="",
        hf_subset="",
        prompt_type=PromptType.document,
    )
    np.testing.assert_allclose(encoded, model.encode(["a cat"], prompt="abstract: "), atol=1e-6)
    model.prompts = {"query": "query: ", "passage": "passage: "}
    assert prompts("scifact") == ["query: ", "passage: ", ""]
    # An instruction goes into the model's own template; prompts by mteb's names are as they are, a training's first.
    model.prompts = {"query": "Instruct: Find it\nQuery:", "document": ""}
    assert prompts("scifact")[0].endswith("\nQuery:") and "scientific" in prompts("scifact")[0]
    assert prompts("STS13")[2].startswith("Instruct: ") and prompts("STS13")[2].endswith("\nQuery:")
    model.prompts |= {
        "Retrieval-query": "task: search result | query: ",
        "Retrieval-document": "text: ",
        "STS": "sts: ",
    }
    assert prompts("SciFact")[:2] == ["task: search result | query: ", "text: "] and prompts("STS13")[2] == "sts: "
    model.prompts |= {"SciFact": "science: ", "FiQA2018-query": "finance: "}
    assert prompts("SciFact")[0] == "science: " and prompts("FiQA2018")[0] == "finance: "
    assert prompts("FiQA2018")[1] == "text: "
    model.prompts |= {"scifact": "trained: ", "questions-query": "asked: "}
    assert prompts("SciFact")[0] == "trained: " and prompts("questions")[0] == "asked: "
    llara = PromptedEncoder(build_model(llm, "llara"), "m", "1")
    sort = [llara.prompt(local_task(folders / "moods").metadata, side) for side in (PromptType.query, None)]
    assert sort == ["{text} The next sentence:", "{text} The original sentence:"]


def test_a_model_without_prompts_is_evaluated_without_and_says_so_once(llm, folders, tmp_path, caplog):
    build_model(llm, "mean").save_pretrained(str(tmp_path / "model"))
    with caplog.at_level(logging.WARNING):
        evaluated = evaluate(tmp_path / "model", [folders / "similar", folders / "moods"], tmp_path / "results")
    assert sum("no prompts" in message for message in caplog.messages) == 1
    assert evaluated.table.count("| none |") == 2


def test_judgements_of_what_is_not_there_are_counted(tmp_path, caplog):
    make_retrieval(tmp_path / "set", [("q0", "gone", 1), ("q99", "d1", 1), ("q3", "gone", 2)])
    task = local_task(tmp_path / "set")
    with caplog.at_level(logging.WARNING):
        task.load_data()
    assert task.counts["judgements of missing documents"] == 2
    assert task.counts["judgements of missing queries"] == 1
    assert "missing documents" in caplog.text
    assert set(task.dataset["default"]["test"]["relevant_docs"]) == {f"q{i}" for i in range(12)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": "b"}], "The layouts are"),
        ([], "The layouts are"),
        ([{"sentence1": "a", "sentence2": "b", "label": label} for label in (0, 1, 2)], "Labels are 1"),
    ],
)
def test_a_folder_in_another_layout_is_refused(tmp_path, rows, message):
    lines(tmp_path / "set" / "test.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        local_task(tmp_path / "set").load_data()


def test_grades_are_whole_numbers(tmp_path):
    task = local_task(make_retrieval(tmp_path / "set", [("q0", "d1", 0.5)]))
    with pytest.raises(ValueError, match="grades 'd1' for 'q0' by 0.5"):
        task.load_data()


def test_a_split_that_is_not_there_names_those_that_are(folders):
    with pytest.raises(FileNotFoundError, match="train.jsonl"):
        local_task(folders / "moods", "dev")
    with pytest.raises(FileNotFoundError, match="Splits of .*: test"):
        local_task(folders / "questions", "dev")


def test_unknown_and_unreachable_tasks(folders, model_folder, tmp_path):
    with pytest.raises(ValueError, match="Near it: .*SciFact"):
        evaluate(model_folder, ["SciFacts"], tmp_path)
    with pytest.raises(ValueError, match="named twice"):
        evaluate(model_folder, [folders / "moods", folders / "moods"], tmp_path)
    with pytest.raises(ConnectionError, match="The data of STS13 are on the Hub"):
        evaluate(model_folder, [folders / "similar", "STS13"], tmp_path)
    assert list(tmp_path.rglob("similar.json"))  # what was done stays


def test_a_benchmark_is_its_tasks():
    from st_llm_embed.evaluation.evaluate import find_tasks

    assert len(find_tasks(["MTEB(eng, v2)"])) > 30


def test_parity(folders, model_folder):
    rows = {row.ways: row for row in parity(model_folder, [folders / "questions", folders / "moods"], batch_size=8)}
    assert set(rows) == {"padded, one at a time", "SDPA, eager", "float32, bfloat16"}
    for ways in ("padded, one at a time", "SDPA, eager"):
        assert rows[ways].difference < 1e-5 and rows[ways].neighbours == 1
    assert 1e-5 < rows["float32, bfloat16"].difference < 0.1


def test_the_command(folders, model_folder, tmp_path, capsys):
    task, output = str(folders / "similar"), str(tmp_path / "results")
    assert main(["evaluate", str(model_folder), "--tasks", task, "--output", output]) == 0
    assert "| similar | STS | cosine_spearman |" in capsys.readouterr().out
    assert main(["evaluate", str(model_folder), "--tasks", task, "--output", output, "--parity"]) == 0
    assert "| SDPA, eager |" in (tmp_path / "results" / "parity.md").read_text()
    assert main(["evaluate", str(model_folder), "--tasks", "nothing", "--output", output]) == 2
    assert "neither a folder nor a task" in capsys.readouterr().err
