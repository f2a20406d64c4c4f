"""Retrieval sets to rows: BEIR, MS MARCO, judged queries and columns, against loops over the same files by hand."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset, load_dataset

from st_llm_embed.data import (
    check_contrastive_columns,
    consecutive_texts,
    from_beir,
    from_columns,
    from_judged_queries,
    from_ms_marco,
    from_ms_marco_triples,
)
from st_llm_embed.data.beir import read_qrels

PLAIN_OR_GZ = pytest.mark.parametrize("suffix", ["", ".gz"])


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def json_lines(rows: list[dict], end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def tuples(dataset: Dataset | IterableDataset) -> list[tuple[str, ...]]:
    if isinstance(dataset, Dataset):
        return list(zip(*dataset[:].values(), strict=True))
    return [tuple(row.values()) for row in dataset]


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.open(file, "rt", encoding="utf-8")]


# Windows line ends, blank lines at the end, line separators and carriage returns inside texts.
CORPUS = [
    {"_id": "d1", "title": "Café", "text": "日本語\u2028x"},
    {"_id": "d2", "title": "", "text": " a\rb "},
    {"_id": "d3", "title": None, "text": "wrong"},
    {"_id": "d4", "title": "", "text": "  "},
    {"_id": "d5", "text": "never judged"},
    {"_id": "d6", "title": "", "text": "a\rb"},
]
QUERIES = [{"_id": "q1", "text": "coffee?"}, {"_id": "q2", "text": "numbers?"}, {"_id": 3, "text": "wrong"}]
QRELS = [
    ("q1", "d1", 2),
    ("q1", "d2", 1),
    ("q1", "d6", 1),  # the text of d2
    ("q1", "d3", 0),
    ("q2", "d4", 1),  # empty
    ("q2", "gone", 1),
    ("3", "d3", 1),  # the query itself
    ("nobody", "d1", 1),
]


def write_beir(folder: Path, suffix: str = "", end: str = "\r\n") -> Path:
    write(folder / f"corpus.jsonl{suffix}", "\ufeff" + json_lines(CORPUS, end) + end + "\n  \n")
    write(folder / f"queries.jsonl{suffix}", json_lines(QUERIES, end))
    lines = ["query-id\tcorpus-id\tscore", *(f"{q}\t{d}\t{s}" for q, d, s in QRELS)]
    write(folder / "qrels" / "train.tsv", end.join(lines) + end)
    return folder


@PLAIN_OR_GZ
def test_beir(tmp_path, suffix):
    folder = write_beir(tmp_path, suffix)
    counts = Counter()
    rows = from_beir(folder, counts=counts)
    assert tuples(rows) == [("coffee?", "Café 日本語\u2028x"), ("coffee?", "a\rb")]
    assert +counts == {
        "read": 3,
        "rows": 2,
        "duplicates": 1,
        "empty": 1,
        "identical": 1,
        "no positive": 2,
        "missing documents": 1,
        "missing queries": 1,
    }
    check_contrastive_columns(rows, "rows")
    rows = from_beir(folder, min_score=2, counts=counts)
    assert tuples(rows) == [("coffee?", "Café 日本語\u2028x")] and counts["below min_score"] == 6
    rows = from_beir(folder, min_score=2, negatives=1, counts=counts)
    assert tuples(rows) == [("coffee?", "Café 日本語\u2028x", "wrong")]
    with pytest.raises(ValueError, match=r"Query 'q1' of .*train.tsv \('coffee\?'\) has 1 negatives, and negatives=2"):
        from_beir(folder, negatives=2)


def test_a_stream_gives_the_same_rows_and_counts_every_time(tmp_path):
    folder = write_beir(tmp_path)
    whole, streamed = Counter(), Counter()
    rows = from_beir(folder, counts=whole)
    stream = from_beir(folder, streaming=True, counts=streamed)
    assert isinstance(stream, IterableDataset) and stream.features == rows.features
    assert streamed == Counter()  # nothing has passed
    for _ in range(2):
        assert tuples(stream) == tuples(rows) and streamed == whole
    next(iter(stream))
    assert streamed["rows"] == 1


def test_what_beir_lacks_is_named(tmp_path):
    folder = write_beir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Neither .*qrels/dev.tsv nor dev.tsv.gz exists. Splits of .*: train"):
        from_beir(folder, split="dev")
    write(folder / "qrels" / "none.tsv", "query-id\tcorpus-id\tscore\n")
    with pytest.raises(ValueError, match="No row is left of what was read: the source is empty"):
        from_beir(folder, split="none")
    write(folder / "qrels" / "bad.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\n")
    with pytest.raises(ValueError, match=r"Line 3 of .*bad.tsv is neither 'query document score' nor"):
        from_beir(folder, split="bad")
    write(folder / "corpus.jsonl", '{"_id": "d1", "text": "x"}\n\n{"_id": "d2", "text": "x}\n')
    with pytest.raises(ValueError, match=r"Line 3 of .*corpus.jsonl is not JSON: Unterminated string"):
        from_beir(folder)
    write(folder / "corpus.jsonl", '{"id": "d1", "text": "x"}\n')
    with pytest.raises(ValueError, match=r"Line 1 of .* has the keys \['id', 'text'\]. BEIR's lines need '_id'"):
        from_beir(folder)
    (folder / "corpus.jsonl").write_bytes(b'{"_id": "d1"}\n{"_id": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"Line 1 of .* has the keys"):
        from_beir(folder)
    (folder / "corpus.jsonl").write_bytes(b'{"_id": "1", "text": ""}\n{"_id": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"Line 2 of .*corpus.jsonl is not UTF-8 text"):
        from_beir(folder)
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"Neither .*corpus.jsonl nor corpus.jsonl.gz exists"):
        from_beir(folder)
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(json_lines(CORPUS).encode())[:-12])
    with pytest.raises(ValueError, match=r"corpus.jsonl.gz is damaged or cut off: Compressed"):
        from_beir(folder)


@pytest.mark.parametrize("name", ["scifact", "wikiqa"])
def test_every_row_of_a_real_set_is_judged(shared, name):
    folder = shared / "data" / name
    counts = Counter()
    rows = from_beir(folder, counts=counts)
    meta = json.loads((folder / "META.json").read_text())
    documents = {row["_id"]: f"{row['title']} {row['text']}".strip() for row in read(folder / "corpus.jsonl.gz")}
    queries = {row["_id"]: row["text"] for row in read(folder / "queries.jsonl.gz")}
    lines = (folder / "qrels" / "train.tsv").read_text().splitlines()[1:]
    expected = {(queries[q].strip(), documents[d]) for q, d, _ in (line.split("\t") for line in lines)}
    assert set(tuples(rows)) == expected and len(rows) == len(expected)
    assert counts["read"] == meta["judged_queries"]["train"]
    assert counts["rows"] + counts["duplicates"] == meta["files"]["qrels/train.tsv"]


PASSAGES = {f"{i}": f"passage number {i}" for i in range(40)} | {"7": "Ünïcode 日本", "9": "passage number 0"}
MARCO_QUERIES = {"1001": "first?", "1002": "second?", "1003": "third?", "1004": "no judgement"}
RELEVANT = {"1001": ["0", "7"], "1002": ["39"], "1003": ["5", "400"], "1005": ["6"]}
RANKED = {
    "1002": ["39", "1", "2", "3"],
    "1001": ["9", "0", *(str(i) for i in range(10, 30))],
    "1004": ["3"],
    "1003": ["8", "401"],
}


def write_ms_marco(folder: Path, suffix: str = "", documents: bool = False, ids: str = "") -> dict[str, Path]:
    def line(number: str, text: str) -> str:
        return f"{ids}{number}\thttp://x\tTitle {number}\t{text}\n" if documents else f"{ids}{number}\t{text}\n"

    order = list(PASSAGES)
    random.shuffle(order)
    run = [(q, ids + d, i + 1) for q, ranked in RANKED.items() for i, d in enumerate(ranked)]
    trec = "".join(f"{q} Q0 {d} {rank} {-rank} tag\n" for q, d, rank in run)
    plain = "".join(f"{q}\t{d}\t{rank}\n" for q, d, rank in run)
    qrels = "".join(f"{q} 0 {ids}{d} 1\n" for q, ds in RELEVANT.items() for d in ds)
    return {
        "collection": write(folder / f"collection.tsv{suffix}", "".join(line(i, PASSAGES[i]) for i in order)),
        "queries": write(folder / f"queries.tsv{suffix}", "".join(f"{q}\t{t}\n" for q, t in MARCO_QUERIES.items())),
        "qrels": write(folder / f"qrels.tsv{suffix}", qrels if documents else qrels.replace(" ", "\t")),
        "run": write(folder / f"run{suffix}", trec if documents else plain),
    }


@PLAIN_OR_GZ
@pytest.mark.parametrize("documents", [False, True])
def test_ms_marco(tmp_path, suffix, documents):
    """Passages in the plain forms, documents in TREC's, with ids of other lengths than the collection's asked for."""
    files = write_ms_marco(tmp_path, suffix, documents, ids="D" if documents else "")
    text = {i: f"Title {i} {t}" if documents else t for i, t in PASSAGES.items()}
    run = files.pop("run")
    counts = Counter()
    pairs = tuples(from_ms_marco(**files, counts=counts))
    assert pairs == [
        (MARCO_QUERIES[q], text[d]) for q, ds in RELEVANT.items() for d in ds if q != "1005" and d in text
    ]
    assert +counts == {"read": 3, "rows": 4, "missing documents": 1, "missing queries": 1}

    rows = from_ms_marco(**files, run=run, negatives=3, drop_short=True, counts=counts)
    made = tuples(rows)
    assert [row[:2] for row in made] == [("second?", text["39"]), ("first?", text["0"]), ("first?", text["7"])]
    place = {text[d]: i for i, d in enumerate(RANKED["1001"])}
    for anchor, _, *wrong in made:
        query = next(q for q, t in MARCO_QUERIES.items() if t == anchor)
        right = {text[d] for d in RELEVANT[query]}
        candidates = {text[d] for d in RANKED[query]} - right
        assert len(wrong) == 3 and set(wrong) <= candidates
        if anchor == "first?":
            assert [place[t] for t in wrong] == sorted(place[t] for t in wrong)  # as they were ranked
    assert counts["too few negatives"] == 1 and counts["missing documents"] == 2
    again = [tuples(from_ms_marco(**files, run=run, negatives=3, seed=s, drop_short=True)) for s in (0, 1)]
    assert again[0] == made != again[1]
    stream = from_ms_marco(**files, run=run, negatives=3, drop_short=True, streaming=True)
    assert isinstance(stream, IterableDataset) and tuples(stream) == made == tuples(stream)


def test_a_negative_with_the_text_of_the_positive_is_a_contradiction(tmp_path):
    """Passage 9 repeats passage 0 under another id: with all candidates read, it is met and counted."""
    files = write_ms_marco(tmp_path)
    write(files["run"], "1001\t9\t1\n1001\t2\t2\n1001\t3\t3\n")
    counts = Counter()
    rows = from_ms_marco(**files, negatives=2, drop_short=True, counts=counts)
    assert {row[2:] for row in tuples(rows)} == {(PASSAGES["2"], PASSAGES["3"])}
    assert counts["contradictions"] == 1


@PLAIN_OR_GZ
def test_ms_marco_triples(tmp_path, suffix):
    files = write_ms_marco(tmp_path, suffix)
    lines = [("1001", "0", "3"), ("1001", "0", "4"), ("1002", "39", "5"), ("1001", "0", "3"), ("1002", "1", "77")]
    triples = write(
        tmp_path / f"triples{suffix}", "".join("\t".join(line) + "\n" for line in [*lines, ("8", "1", "2")])
    )
    counts = Counter()
    rows = from_ms_marco_triples(files["collection"], files["queries"], triples, counts=counts)
    assert tuples(rows) == [(MARCO_QUERIES[q], PASSAGES[p], PASSAGES[n]) for q, p, n in lines[:3]]
    assert +counts == {
        "read": 5,
        "rows": 3,
        "duplicates": 1,
        "missing documents": 1,
        "too few negatives": 1,
        "missing queries": 1,
    }


def test_what_ms_marco_lacks_is_named(tmp_path):
    files = write_ms_marco(tmp_path)
    run = files.pop("run")
    with pytest.raises(ValueError, match="run='None' and negatives=3: give both, or neither"):
        from_ms_marco(**files, negatives=3)
    with pytest.raises(ValueError, match="give both, or neither"):
        from_ms_marco(**files, run=run)
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        from_ms_marco(**{**files, "qrels": tmp_path / "gone"}, streaming=True)
    with pytest.raises(ValueError, match=r"Query '1002' .* has 3 negatives, and negatives=4 asks for 4"):
        from_ms_marco(**files, run=run, negatives=4)
    write(run, "1001\t3\t1\n1002\t3\t1\n1001\t4\t2\n")
    with pytest.raises(ValueError, match="returns to query '1001'. Fix: sort it by query"):
        from_ms_marco(**files, run=run, negatives=1, drop_short=True)
    write(run, "1001 3\n")
    with pytest.raises(ValueError, match="Line 1 of .*run is neither 'query document rank' nor"):
        from_ms_marco(**files, run=run, negatives=1)
    write(files["queries"], "1001\tfirst?\n1002 second?\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*queries.tsv has 1 fields between tabs, not 2: '1002 second\?'"):
        from_ms_marco(**files)
    files = write_ms_marco(tmp_path)
    write(files["collection"], "".join(f"{i}\ta\tb\n" for i in PASSAGES))
    with pytest.raises(ValueError, match="The line of '0' in .*collection.tsv has 3 fields between tabs"):
        from_ms_marco(files["collection"], files["queries"], files["qrels"])
    packed = tmp_path / "collection.tsv.gz"
    packed.write_bytes(gzip.compress(b"1\ttext\n" * 100)[:-12])
    with pytest.raises(ValueError, match="collection.tsv.gz is damaged or cut off: Compressed file ended"):
        from_ms_marco(packed, files["queries"], files["qrels"])


def test_the_collection_is_not_held_in_memory(tmp_path):
    """Of 60,000 passages, 43 MB, the peak is a small part; longer passages do not raise it."""
    peaks = []
    for length in (20, 700):
        collection = tmp_path / "collection.tsv"
        with open(collection, "w") as file:
            file.writelines(f"{i}\t{i} {'x' * length}\n" for i in range(60_000))
        write(tmp_path / "queries.tsv", "".join(f"{q}\tquery {q}\n" for q in range(50)))
        write(tmp_path / "qrels.tsv", "".join(f"{q}\t0\t{q * 1000 + 7}\t1\n" for q in range(50)))
        stream = from_ms_marco(collection, tmp_path / "queries.tsv", tmp_path / "qrels.tsv", streaming=True)
        tracemalloc.start()
        made = tuples(stream)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert made == [(f"query {q}", f"{q * 1000 + 7} {'x' * length}") for q in range(50)]
    assert collection.stat().st_size > 42e6
    assert peaks[1] < 12e6 and peaks[1] - peaks[0] < 1e6


FLAG = [
    {"query": "q1", "pos": ["p1", "p2"], "neg": ["n1", "n2", "p2", "n3"]},
    {"query": "q2", "pos": ["p3"], "neg": ["n1", "q2", " ", "n4", "n4"], "prompt": "unused"},
    {"query": "q1", "pos": ["p1", "p2"], "neg": ["n1", "n2", "p2", "n3"]},
]
TEVATRON = [
    {
        "query_id": "1",
        "query": row["query"],
        "positive_passages": [{"docid": "a", "title": "", "text": text} for text in row["pos"]],
        "negative_passages": [{"docid": "b", "title": "", "text": text} for text in row["neg"]],
    }
    for row in FLAG
]


@PLAIN_OR_GZ
@pytest.mark.parametrize("rows", [FLAG, TEVATRON])
def test_judged_queries(tmp_path, suffix, rows):
    file = write(tmp_path / f"train.jsonl{suffix}", json_lines(rows) + "\n\n")
    counts = Counter()
    made = from_judged_queries(file, negatives=2, counts=counts)
    assert [row[:2] for row in tuples(made)] == [("q1", "p1"), ("q1", "p2"), ("q2", "p3")]
    allowed = [{"n1", "n2", "n3"}] * 2 + [{"n1", "n4"}]
    assert all(len({*row[2:]}) == 2 and {*row[2:]} <= texts for row, texts in zip(tuples(made), allowed, strict=True))
    assert +counts == {"read": 3, "rows": 3, "contradictions": 3, "duplicates": 3, "empty": 1}
    check_contrastive_columns(made, "made", negatives=2)
    with pytest.raises(ValueError, match="'made' has 2 columns of negatives, and its task asks for negatives=7"):
        check_contrastive_columns(made, "made", negatives=7)
    pairs = from_judged_queries(file, counts=counts)
    assert tuples(pairs) == [("q1", "p1"), ("q1", "p2"), ("q2", "p3")] and counts["duplicates"] == 2
    # The same rows from a table, a stream, and a stream of a table.
    table = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    streamed = load_dataset("json", data_files=str(file), split="train", streaming=True)
    for source in (table, streamed, table.to_iterable_dataset()):
        again = from_judged_queries(source, negatives=2)
        assert isinstance(again, Dataset if source is table else IterableDataset) and tuples(again) == tuples(made)


def test_the_choice_of_negatives_is_the_seeds_and_no_candidate_is_left_out():
    """Over many rows each candidate is chosen about equally often, and no row's choice depends on its neighbours."""
    rows = [{"query": f"q{i}", "pos": ["p"], "neg": [f"n{j}" for j in range(5)]} for i in range(400)]
    made = tuples(from_judged_queries(Dataset.from_list(rows), negatives=2))
    assert made == tuples(from_judged_queries(Dataset.from_list(rows), negatives=2))
    other = tuples(from_judged_queries(Dataset.from_list(rows), negatives=2, seed=1))
    assert sum(a == b for a, b in zip(made, other, strict=True)) < 100  # 1 in 10 by chance
    assert made[200:] == tuples(from_judged_queries(Dataset.from_list(rows[200:]), negatives=2))
    chosen = Counter(text for row in made for text in row[2:])
    assert set(chosen) == {f"n{j}" for j in range(5)} and all(110 < count < 210 for count in chosen.values())


def test_short_rows_are_refused_or_dropped(tmp_path):
    rows = [{"query": "a", "pos": ["p"], "neg": ["1", "2"]}, {"query": "b", "pos": ["p"], "neg": ["1", "p"]}]
    file = write(tmp_path / "train.jsonl", json_lines(rows))
    with pytest.raises(
        ValueError, match=r"Line 2 of .*train.jsonl \('b'\) has 1 negatives, and negatives=2 asks for 2"
    ):
        from_judged_queries(file, negatives=2)
    with pytest.raises(ValueError, match=r"Row 1 \('b'\) has 1 negatives.*mine more, or drop .* drop_short=True"):
        from_judged_queries(Dataset.from_list(rows), negatives=2)
    counts = Counter()
    assert tuples(from_judged_queries(file, negatives=2, drop_short=True, counts=counts)) == [("a", "p", "1", "2")]
    assert counts["too few negatives"] == counts["contradictions"] == 1
    with pytest.raises(ValueError, match="No row is left of what was read: .*'too few negatives': 2"):
        from_judged_queries(file, negatives=3, drop_short=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "a", "pos": ["b"]', "Line 2 of .* is not JSON"),
        ('{"query": "a", "pos": ["b \\ud83d"]}', "Line 2 of .* is not JSON: .*surrogates not allowed"),
        ('["a", "b"]', r"Line 2 of .* is no JSON object"),
        (
            '{"query": "a", "positive": ["b"]}',
            r"Line 2 of .* has the columns \['query', 'positive'\]. Needed: 'query'",
        ),
        ('{"query": "a", "pos": "b"}', "Line 2 of .* has 'b' in 'pos', which must be a list"),
        ('{"query": "a", "pos": [3]}', "Line 2 of .* has 3 where text is expected"),
        ('{"query": ["a"], "pos": ["b"]}', r"Line 2 of .* has \['a'\] where text is expected"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = write(tmp_path / "train.jsonl", '{"query": "a", "pos": ["b"]}\n' + line)
    with pytest.raises(ValueError, match=message):
        from_judged_queries(file)
    stream = from_judged_queries(file, streaming=True)
    with pytest.raises(ValueError, match=message):
        list(stream)
    if "query" in line and "[3]" not in line:
        write(file, line)
        with pytest.raises(ValueError, match=message.replace("Line 2", "Line 1")):
            list(from_judged_queries(file, streaming=True))


def test_columns_of_a_hub_data_set(tmp_path):
    """load_dataset reads a folder as it reads a repository of the Hub."""
    rows = [
        {"question": "q1", "answer": "a1", "bad": "x", "worse": "y", "id": 1},
        {"question": " q2", "answer": "a2\n", "bad": "a2", "worse": "y", "id": 2},
        {"question": "q1", "answer": "a1", "bad": "x", "worse": "y", "id": 3},
        {"question": "q3", "answer": None, "bad": "x", "worse": "y", "id": 4},
        {"question": "q4", "answer": "q4", "bad": "x", "worse": "y", "id": 5},
    ]
    write(tmp_path / "hub" / "train.jsonl", json_lines(rows))
    load = {"path": str(tmp_path / "hub"), "split": "train", "cache_dir": str(tmp_path / "cache")}
    options = {"anchor": "question", "positive": "answer", "negatives": ["bad", "worse"], "drop_short": True}
    counts = Counter()
    made = from_columns(load_dataset(**load), **options, counts=counts)
    assert made.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert tuples(made) == [("q1", "a1", "x", "y")]
    assert +counts == {
        "read": 5,
        "rows": 1,
        "duplicates": 1,
        "contradictions": 1,
        "too few negatives": 1,
        "empty": 1,
        "identical": 1,
        "no positive": 2,
    }
    assert tuples(from_columns(load_dataset(**load, streaming=True), **options)) == tuples(made)
    pairs = from_columns(load_dataset(**load), anchor="question", positive="answer")
    assert tuples(pairs) == [("q1", "a1"), ("q2", "a2")]
    with pytest.raises(ValueError, match=r"Row 1 \('q2'\) has 1 negatives, and negatives=2"):
        from_columns(load_dataset(**load), **{**options, "drop_short": False})
    with pytest.raises(
        ValueError, match=r"Row 0 has the columns \['question', .*, and not \['anchor'\]. Fix: .*anchor="
    ):
        from_columns(load_dataset(**load, streaming=True), positive="answer")
    with pytest.raises(ValueError, match="Row 0 has 1 where text is expected"):
        from_columns(load_dataset(**load), anchor="id", positive="answer")
    with pytest.raises(ValueError, match="The source is empty"):
        from_columns(load_dataset(**load).select([]), anchor="question", positive="answer")
    with pytest.raises(FileNotFoundError, match="file or folder org/name, nor could a data set of the Hub"):
        from_columns("org/name")


def test_real_pairs_keep_what_is_sound(shared):
    counts = Counter()
    made = from_columns(shared / "data" / "medquad" / "train.jsonl.gz", counts=counts)
    raw = [(row["anchor"].strip(), row["positive"].strip()) for row in read(shared / "data/medquad/train.jsonl.gz")]
    assert tuples(made) == list(dict.fromkeys(pair for pair in raw if pair[0] != pair[1]))
    assert len(raw) == counts["read"] == counts["rows"] + counts["duplicates"] + counts["identical"] == 14809
    with pytest.raises(ValueError, match=r"Line 52 of .*has 0 negatives, and negatives=1 asks for 1"):
        from_columns(shared / "data" / "trecqa" / "train.jsonl.gz", negatives=["negative"])


@pytest.mark.parametrize(
    "header", ["", "query-id\tcorpus-id\tscore\n", "query-id\titer\tcorpus-id\tscore\n", "\n\nq d s\n"]
)
@pytest.mark.parametrize("form", ["{q}\t{d}\t{s}\n", "{q} {d} {s}\n", "{q} 0 {d} {s}\n", "{q}\t0\t{d}\t{s}.0\r\n"])
@PLAIN_OR_GZ
def test_judgements_in_every_form(tmp_path, header, form, suffix):
    lines = [("q1", "d1", 2), ("q1", "d2", -1), ("3", "3", 0)]
    file = write(
        tmp_path / f"test.tsv{suffix}", "\ufeff" + header + "".join(form.format(q=q, d=d, s=s) for q, d, s in lines)
    )
    assert list(read_qrels(file)) == lines


@pytest.mark.parametrize("score", ["nan", "inf", "one"])
def test_a_judgement_that_is_no_number_is_named(tmp_path, score):
    file = write(tmp_path / "test.tsv", f"query-id\tcorpus-id\tscore\nq\td\t{score}\n")
    with pytest.raises(ValueError, match="Line 2 of .*test.tsv is neither"):
        list(read_qrels(file))


def test_beir_files_are_read_as_beir_reads_them(tmp_path):
    """Whole numbers for ids, a line that comes again, no title of a query, judgements in .gz."""
    write(tmp_path / "corpus.jsonl", json_lines([{"_id": 1, "title": "T", "text": "new"}] * 2))
    write(tmp_path / "queries.jsonl", json_lines([{"_id": 7, "title": "not read", "text": "q"}]))
    write(tmp_path / "qrels" / "train.tsv.gz", "7\t1\t1\n")
    assert tuples(from_beir(tmp_path)) == [("q", "T new")]
    write(tmp_path / "corpus.jsonl", json_lines([{"_id": 1, "text": "old"}, {"_id": 1, "title": "T", "text": "new"}]))
    with pytest.raises(ValueError, match="corpus.jsonl has the id '1' for two texts, 'old' and 'T new'. Fix"):
        from_beir(tmp_path)
    write(tmp_path / "corpus.jsonl", json_lines([{"_id": 1, "title": "T", "text": "new"}]))
    for wrong in (None, 1.5, ["1"]):
        write(tmp_path / "queries.jsonl", json_lines([{"_id": wrong, "text": "q"}]))
        with pytest.raises(
            ValueError, match="Line 1 of .*queries.jsonl has the '_id' .*Ids are text or whole numbers"
        ):
            from_beir(tmp_path)
    write(tmp_path / "queries.jsonl", json_lines([{"_id": 7, "text": 5}]))
    with pytest.raises(ValueError, match="Line 1 of .*queries.jsonl has 5 where text is expected"):
        from_beir(tmp_path)


def test_spellings_of_one_text_are_one_text():
    """White space and the forms of Unicode make no other text; capitals do."""
    rows = [
        {
            "query": "where is the café?",
            "pos": ["the\tcafé  is here"],
            "neg": ["the cafe\u0301 is here", "n1", " n1 ", "N1"],
        },
        {"query": "where is the cafe\u0301?", "pos": ["the café is here "], "neg": ["n1", "N1"]},
        {"query": "ﬁsh", "pos": ["fish", "a fish"], "neg": ["n1", "N1", "ﬁsh"]},
    ]
    counts = Counter()
    made = from_judged_queries(Dataset.from_list(rows), negatives=2, counts=counts)
    assert tuples(made) == [
        ("where is the café?", "the\tcafé  is here", "n1", "N1"),
        ("ﬁsh", "a fish", "n1", "N1"),
    ]
    assert +counts == {"read": 3, "rows": 2, "contradictions": 2, "duplicates": 2, "identical": 1}


def test_builders_say_what_they_left_out(tmp_path, caplog):
    rows = tmp_path / "rows.jsonl"
    lines = [{"query": "a", "pos": ["b"]}, {"query": "a", "pos": ["b"]}, {"query": "c", "pos": [" ", "d"]}]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    from_judged_queries(str(rows))
    assert "2 rows were made of 3 anchors. Left out: 1 duplicates, 1 empty." in caplog.text
    caplog.clear()
    consecutive_texts(["One.\n\nTwo.", "", "Alone."])
    assert "1 rows were made of 3 documents. Left out: 1 empty documents, 1 documents of one text." in caplog.text
    caplog.clear()
    from_judged_queries(str(rows), counts=(counts := Counter()))
    assert counts["duplicates"] == counts["empty"] == 1
