"""Several models in one table: scores by query, paired intervals, names, what is kept, what is checked before."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from math import log2

import mteb
import numpy as np
import pytest
from conftest import save_llm
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer
from test_evaluation import lines, make_retrieval, text

from st_llm_embed import Task, build_model
from st_llm_embed.cli import main
from st_llm_embed.evaluation import PromptedEncoder, compare, evaluate, local_task
from st_llm_embed.evaluation.bootstrap import DRAWS, paired_interval
from st_llm_embed.evaluation.evaluate import evaluate_encoder
from st_llm_embed.evaluation.model_names import model_names
from st_llm_embed.evaluation.query_scores import kept_query_scores, mean_score
from st_llm_embed.tasks import encoding_prompts

# The names of these files in the package are their functions'.
compare_file, evaluate_file = (sys.modules[f"st_llm_embed.evaluation.{name}"] for name in ("compare", "evaluate"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two retrieval sets, one of which has documents for queries, STS and clustering."""
    root = tmp_path_factory.mktemp("data")
    make_retrieval(root / "questions")
    documents = [{"_id": f"{i}", "title": "", "text": text(0, i)} for i in range(30)]
    lines(root / "arguments" / "corpus.jsonl", documents)
    lines(root / "arguments" / "queries.jsonl", documents[:12])
    (root / "arguments" / "qrels").mkdir()
    rows = "".join(f"{i}\t{i + 12}\t1\n" for i in range(12))
    (root / "arguments" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    pairs = [{"sentence1": text(2, i), "sentence2": text(3, i), "score": i % 6} for i in range(30)]
    lines(root / "similar" / "test.jsonl", pairs)
    lines(root / "topics" / "test.jsonl", [{"text": text(6, i), "label": i % 3} for i in range(60)])
    return root


@pytest.fixture(scope="module")
def runs(llm, tmp_path_factory):
    """Two runs' models of one stage, under other prompts."""
    root = tmp_path_factory.mktemp("runs")
    for run, instruction in (("x", "Find what answers the question"), ("y", "Find what moons and dogs jumped over")):
        model = build_model(llm, "nv-embed", num_latents=8, head_dim=8)
        model.prompts.update(encoding_prompts([Task("questions", instruction)], model.prompts))
        model.save_pretrained(str(root / run / "2-blended" / "model"))
    return [root / run / "2-blended" / "model" for run in ("x", "y")]


def queries_of(folder, source, tasks, output):
    """The scores by query that an evaluation keeps, and the score that mteb gives."""
    evaluated = evaluate(source, tasks, output)
    by_task = {}
    for result, task in zip(evaluated.results, tasks, strict=True):
        by_task[result.task_name] = kept_query_scores(evaluated.folder, local_task(task), result), result.get_score()
    return by_task


def test_scores_by_query_are_the_formulas_and_their_mean_is_mtebs(folders, runs, tmp_path):
    tasks = [folders / "questions", folders / "arguments"]
    kept = queries_of(folders, runs[0], tasks, tmp_path)
    for name in ("questions", "arguments"):
        scores, score = kept[name]
        assert len(scores["test"]["default"]) == 12 and 0 < score < 1
        assert mean_score(scores) == pytest.approx(score, abs=1e-5)
    model = SentenceTransformer(str(runs[0]), trust_remote_code=True)
    queries = model.encode_query([text(1, i) for i in range(12)], prompt=model.prompts["questions"])
    similar = model.similarity(queries, model.encode_document([text(0, i) for i in range(40)])).numpy()
    for i, row in enumerate(similar):
        grades = {(7 * i + k) % 40: 2 - k for k in range(3)}
        found = sum(grades.get(j, 0) / log2(rank + 2) for rank, j in enumerate(np.argsort(-row)[:10]))
        assert kept["questions"][0]["test"]["default"][f"q{i}"] == pytest.approx(found / (2 + 1 / log2(3)), abs=1e-5)


class TwoLanguages(AbsTaskRetrieval):
    """A task as mteb's older ones are: dictionaries, in two subsets and two splits of unequal sizes."""

    def load_data(self, *args, **kwargs):
        if self.data_loaded:
            return
        self.queries, self.corpus, self.relevant_docs = {}, {}, {}
        for k, subset in enumerate(("en", "de")):
            asked = {"dev": range(5 + k), "test": range(11 - k)}
            self.queries[subset] = {
                split: {f"q{i}": text(1, k, i) for i in numbers} for split, numbers in asked.items()
            }
            self.corpus[subset] = {split: {f"d{i}": {"text": text(0, k, i)} for i in range(40)} for split in asked}
            self.relevant_docs[subset] = {
                split: {f"q{i}": {f"d{(7 * i + j) % 40}": 1 for j in range(3)} for i in numbers}
                for split, numbers in asked.items()
            }
        self.data_loaded = True


def two_languages(figure: str) -> AbsTaskRetrieval:
    metadata = TaskMetadata(
        name=f"Two-{figure}",
        description="two languages",
        dataset={"path": "two", "revision": "1"},
        type="Retrieval",
        category="t2t",
        eval_splits=["dev", "test"],
        eval_langs={"en": ["eng-Latn"], "de": ["deu-Latn"]},
        main_score=figure,
    )
    return type("TwoLanguages", (TwoLanguages,), {"metadata": metadata})()


@pytest.mark.parametrize("figure", ["ndcg_at_10", "map_at_5", "recall_at_20", "precision_at_1", "mrr_at_10"])
def test_a_task_of_mteb_in_several_subsets_and_splits(runs, tmp_path, figure):
    encoder = PromptedEncoder(SentenceTransformer(str(runs[0]), trust_remote_code=True), "m", "1")
    encoder.mteb_model_meta.experiment_kwargs = {"dtype": "float32", "attn_implementation": "x", "max_seq_length": 9}
    task = two_languages(figure)
    evaluated = evaluate_encoder(encoder, "m", [task], tmp_path, 8, by_query=True)
    (result,) = evaluated.results
    kept = kept_query_scores(evaluated.folder, task, result)
    if figure == "mrr_at_10":  # which is mteb's own
        assert kept is None
        return
    sizes = {split: {subset: len(own) for subset, own in subsets.items()} for split, subsets in kept.items()}
    assert sizes == {"dev": {"en": 5, "de": 6}, "test": {"en": 11, "de": 10}}
    assert mean_score(kept) == pytest.approx(result.get_score(), abs=1e-5) and 0 < result.get_score() < 1
    # A split that is missing is added to those that are kept.
    file = evaluated.folder / f"{task.metadata.name}.json"
    stored = json.loads(file.read_text())
    del stored["scores"]["test"]
    file.write_text(json.dumps(stored))
    kept_file = evaluated.folder / "queries" / file.name
    queries = json.loads(kept_file.read_text())
    del queries["scores"]["test"]
    queries["scores"]["dev"]["en"]["q0"] = 7.0  # is not computed again
    kept_file.write_text(json.dumps(queries))
    (again,) = evaluate_encoder(encoder, "m", [two_languages(figure)], tmp_path, 8, by_query=True).results
    assert again.get_score() == pytest.approx(result.get_score())
    kept["dev"]["en"]["q0"] = 7.0
    assert kept_query_scores(evaluated.folder, task, again) == kept


def test_the_interval_is_that_of_a_loop_and_of_the_normal_distribution(monkeypatch):
    values = np.random.default_rng(3).normal(0.1, 0.5, 400)
    random = np.random.default_rng(0)
    means = [np.mean([values[random.integers(400)] for _ in range(400)]) for _ in range(500)]
    low, high = paired_interval([values])
    error = values.std() / 20
    assert [low, high] == pytest.approx([values.mean() - 1.96 * error, values.mean() + 1.96 * error], abs=0.06 * error)
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.4 * error)
    assert paired_interval([values]) == (low, high) != paired_interval([values], seed=1)
    # Subsets count alike, whatever their size, and each is sampled by itself.
    few = np.random.default_rng(4).normal(0.3, 0.5, 100)
    low, high = paired_interval([values, few])
    middle, error = (values.mean() + few.mean()) / 2, np.hypot(values.std() / 20, few.std() / 10) / 2
    assert [low, high] == pytest.approx([middle - 1.96 * error, middle + 1.96 * error], abs=0.06 * error)
    monkeypatch.setattr("st_llm_embed.evaluation.bootstrap.LARGEST_BLOCK", 999)  # in more blocks than one
    assert paired_interval([values, few]) == pytest.approx((low, high), abs=0.06 * error)
    assert paired_interval([np.full(5, 0.25)]) == (0.25, 0.25) and DRAWS == 10_000


def test_the_table_has_all_figures_and_the_differences_to_the_first(folders, runs, tmp_path, monkeypatch):
    tasks = sorted(folders.iterdir())
    compared = compare([*runs, runs[0]], tasks, tmp_path, batch_size=8)
    names = ["x/2-blended", "y/2-blended", "x/2-blended (2)"]
    assert list(compared.results) == names and len(compared.differences) == 8
    alone = {run: evaluate(run, tasks, tmp_path / "alone", batch_size=8) for run in runs}
    for name, run in zip(names, [*runs, runs[0]], strict=True):
        scores = [result.get_score() for result in compared.results[name]]
        assert scores == pytest.approx([result.get_score() for result in alone[run].results], abs=1e-6)  # as stored
    assert alone[runs[0]].table.startswith("x/2-blended (")
    table = compared.table.splitlines()
    header = next(line for line in table if line.startswith("| task"))
    assert header.split(" | ")[3:] == [*names, "y/2-blended minus x/2-blended", "x/2-blended (2) minus x/2-blended |"]
    for place, task in enumerate(tasks):
        first, other = (alone[run].results[place].get_score() for run in runs)
        row = next(line for line in table if line.startswith(f"| {task.name} |"))
        assert f"| {first:.4f} | {other:.4f} | {first:.4f} | {other - first:+.4f} " in row
        own = [difference for difference in compared.differences if difference.task == task.name]
        assert [difference.difference for difference in own] == pytest.approx([other - first, 0], abs=1e-6)
        if task.name in ("similar", "topics"):
            assert [difference.interval for difference in own] == [None, None]
            assert row.count("(no interval)") == 2
            continue
        x, y = (
            kept_query_scores(alone[run].folder, local_task(task), alone[run].results[place])["test"]["default"]
            for run in runs
        )
        assert own[0].interval == paired_interval([np.array([y[query] - x[query] for query in x])])
        assert own[0].interval[0] <= other - first <= own[0].interval[1] and own[1].interval == (0, 0)
        assert "[{:+.4f}, {:+.4f}] | +0.0000 [+0.0000, +0.0000] |".format(*own[0].interval) in row
    assert compared.differences[2].interval != (0, 0)  # the runs' models differ
    assert (tmp_path / "comparison.md").read_text() == compared.table
    monkeypatch.setattr(PromptedEncoder, "encode", None)
    assert compare([*runs, runs[0]], tasks, tmp_path).table == compared.table


def test_scores_by_query_are_computed_where_they_are_missed_and_only_then(folders, runs, tmp_path, monkeypatch):
    tasks = [folders / "questions", folders / "similar"]
    for run in runs:
        folder = evaluate(run, tasks, tmp_path).folder
    encoded = []
    encode = PromptedEncoder.encode

    def counted(self, inputs, *, task_metadata, **kwargs):
        encoded.append(task_metadata.name)
        return encode(self, inputs, task_metadata=task_metadata, **kwargs)

    monkeypatch.setattr(PromptedEncoder, "encode", counted)
    first = compare(runs, tasks, tmp_path)
    assert not encoded  # evaluate keeps them too
    assert [path.name for path in (folder / "queries").iterdir()] == ["questions.json"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # nor is what was retrieved kept
    shutil.rmtree(folder / "queries")
    evaluate(runs[1], tasks, tmp_path)
    assert not encoded
    assert compare(runs, tasks, tmp_path).table == first.table and {*encoded} == {"questions"}
    # Of other data under the same name they are others.
    make_retrieval(tmp_path / "questions", [("q1", "d3", 2), ("q2", "d9", 1)])
    changed = compare(runs, [tmp_path / "questions"], tmp_path)
    fresh = compare(runs, [tmp_path / "questions"], tmp_path / "fresh")
    assert changed.table == fresh.table and changed.differences != first.differences[:1]


def test_everything_is_checked_before_a_model_is_loaded(folders, runs, llm, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_file, "load_any", None)
    short = tmp_path / "short"
    build_model(save_llm(tmp_path / "llm", max_position_embeddings=64), "mean").save_pretrained(str(short))
    strange = tmp_path / "strange"
    shutil.copytree(runs[1], strange)
    modules = json.loads((strange / "modules.json").read_text())
    (strange / "mine.py").write_text("class Mine: pass\n")
    (strange / "modules.json").write_text(
        json.dumps([*modules, {"idx": 9, "name": "9", "path": "", "type": "mine.Mine"}])
    )
    task = folders / "questions"
    for sources, tasks, settings, message in (
        (runs[:1], [task], {}, "There are 1 models to compare"),
        (runs, [task, "SciFacts"], {}, "Near it: .*SciFact"),
        (runs, [task, task], {}, "named twice"),
        (runs, [], {}, "no tasks"),
        (runs, [task], {"batch_size": 0}, "batch_size=0 must be 1 or more"),
        (runs, [task], {"dtype": "Tensor"}, "dtype='Tensor' is no precision. Valid ones: float32"),
        (runs, [task], {"attn_implementation": "spda"}, "attn_implementation='spda' is no attention. Valid .*sdpa"),
        (runs, [task], {"device": "gpu"}, "device='gpu' cannot be used"),
        (
            [*runs, short],
            [task],
            {"max_seq_length": 100},
            "short cannot be loaded: max_seq_length=100 must be from 1 to 64",
        ),
        ([*runs, strange], [task], {}, "runs code that this version of the package does not ship"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(sources, tasks, tmp_path / "results", **settings)
    for settings in ({"batch_size": -1}, {"dtype": "int8"}, {"device": "gpu"}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
            evaluate(runs[0], [task], tmp_path / "results", **settings)
    for gone, kind in ((tmp_path / "gone", OSError), ("org/gone", OSError)):
        with pytest.raises(kind, match=f"{gone} cannot be loaded"):
            compare([*runs, gone], [task], tmp_path / "results")
    with pytest.raises(FileNotFoundError, match="Splits of .*: test"):
        compare(runs, [task], tmp_path / "results", split="dev")
    assert not (tmp_path / "results").exists()


def test_one_model_is_in_memory_at_a_time(folders, runs, tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    load = compare_file.load_encoder

    def counted(*args, **kwargs):
        assert not [model for model in alive if model() is not None]
        encoder = load(*args, **kwargs)
        alive.append(weakref.ref(encoder.model))
        return encoder

    monkeypatch.setattr(compare_file, "load_encoder", counted)
    compare([*runs, runs[0]], [folders / "questions"], tmp_path)
    assert len(alive) == 3


def test_models_keep_a_short_name_that_is_theirs_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/x/1-pretext/model", "runs/x/2-blended/model", "runs/y/2-blended/model", "a/model", "b/model"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("tiny", "org/tiny", "model", "old/runs/x/2-blended"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    here = tmp_path.name
    for sources, names in (
        (["runs/x/2-blended/model"], ["x/2-blended"]),
        (["runs/x/1-pretext/model", "tiny", "runs/x/2-blended/model"], ["x/1-pretext", "tiny", "x/2-blended"]),
        (["runs/x/2-blended/model", "runs/y/2-blended/model"], ["x/2-blended", "y/2-blended"]),
        (["a/model", "b/model"], ["a", "b"]),
        (["a", "a/model"], ["a", "model"]),
        (["org/tiny", "tiny"], ["org/tiny", f"{here}/tiny"]),
        (["hub/tiny", "tiny", "other/tiny"], ["hub/tiny", f"{here}/tiny", "other/tiny"]),
        (["tiny", tmp_path / "tiny", "./tiny"], ["tiny", "tiny (2)", "tiny (3)"]),
        (["old/runs/x/2-blended", "runs/x/2-blended/model"], ["old/runs/x/2-blended", f"{here}/runs/x/2-blended"]),
    ):
        assert model_names(sources) == names
    monkeypatch.chdir(tmp_path / "model")
    assert model_names(["."]) == [here]


def test_the_command_takes_several_models(folders, runs, tmp_path, capsys):
    models = [str(run) for run in runs]
    options = ["--tasks", str(folders / "questions"), str(folders / "similar"), "--output", str(tmp_path)]
    assert main(["evaluate", *models, *options]) == 0
    said = capsys.readouterr().out
    assert "| y/2-blended minus x/2-blended |" in said and str(tmp_path / "comparison.md") in said
    assert mteb.__version__ in said
    assert main(["evaluate", *models, *options, "--parity"]) == 2
    assert f"--parity takes one model, not 2: leave out {models[1]}." in capsys.readouterr().err
    assert main(["evaluate", *models, *options, "--revision", "v1"]) == 2
    assert "--revision takes one model, not 2. Fix: hf download" in capsys.readouterr().err
