"""Rows as people have them: CSV, TSV, Parquet, JSON lines, plain text, by path, under names of their own."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import save_llm

from st_llm_embed import build_model
from st_llm_embed.cli import main
from st_llm_embed.data import consecutive_texts, from_class_examples, from_columns, from_sts, load_corpus, load_rows
from st_llm_embed.data.text_files import LONGEST_LINE
from st_llm_embed.hub import save_sealed

ROWS = [
    {"question": 'what is "null"?', "answer": "null"},
    {"question": "NA", "answer": "007"},
    {"question": "a, b\nand c", "answer": "日本語 café"},
    {"question": "2020", "answer": "1e5"},
]


def write(folder, ending, rows=ROWS):
    file = folder / f"rows{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file
    opened = gzip.open(file, "wt", newline="") if ending.endswith(".gz") else open(file, "w", newline="")
    with opened as handle:
        if ending.startswith(".csv"):
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        elif ending == ".tsv":
            handle.write("\t".join(rows[0]) + "\n" + "".join("\t".join(row.values()) + "\n" for row in rows))
        else:
            handle.write("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".tsv", ".parquet", ".jsonl", ".jsonl.gz"])
def test_each_format_gives_the_texts_as_they_are(tmp_path, ending, streaming):
    """No "null" becomes an empty text, no "007" a 7, and quotes of a TSV file are its text's."""
    rows = [row for row in ROWS if "\n" not in row["question"]] if ending == ".tsv" else ROWS
    file = write(tmp_path, ending, rows)
    expected = [{"anchor": row["question"], "positive": row["answer"]} for row in rows]
    names = {"anchor": "question", "positive": "answer"}
    assert list(load_rows(file, streaming, names)) == expected
    assert list(from_columns(file, **names, streaming=streaming)) == expected


def test_plain_text_is_a_document_for_each_file(tmp_path):
    (tmp_path / "one.txt").write_text("First.\n\nSecond.\n")
    (tmp_path / "two.txt").write_text("Third.\n\nFourth.")
    expected = [{"text": "First.", "next": "Second."}, {"text": "Third.", "next": "Fourth."}]
    assert list(consecutive_texts(load_rows(tmp_path))) == expected
    assert list(consecutive_texts(load_rows(tmp_path / "two.txt", streaming=True))) == expected[1:]


def test_scores_and_classes_of_a_csv_file(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "score": "4.5"}, {"sentence1": "c", "sentence2": "d", "score": "1"}]
    assert len(from_sts(write(tmp_path, ".csv", rows))) == 2  # both directions
    bad = write(tmp_path, ".csv", [*rows, {"sentence1": "e", "sentence2": "f", "score": "high"}])
    with pytest.raises(ValueError, match="Row 3 of .*rows.csv has the score 'high'"):
        from_sts(bad)
    texts = [
        {"text": f"{name} {i}", "label": label} for label, name in (("0", "red"), ("1", "blue")) for i in range(3)
    ]
    assert len(from_class_examples(write(tmp_path, ".tsv", texts), negatives=1)) == 6


def test_what_is_not_there_is_said_at_once(tmp_path):
    for path in (str(tmp_path / "none.csv"), "./none", "~/none/at/all", "none.jsonl.gz", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="There is no file or folder"):
            load_rows(path)
    file = write(tmp_path, ".csv")
    with pytest.raises(ValueError, match=r"has the columns \['question', 'answer'\], and not \['title'\]"):
        load_rows(file, columns={"anchor": "title"})
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n1,2,3,4\n")
    for read in (load_rows, lambda path: from_columns(path, anchor="a", positive="b")):
        with pytest.raises(ValueError, match="Line 3 of .*ragged.csv has 4 fields"):
            read(tmp_path / "ragged.csv")


def test_mine_takes_a_csv_file_and_a_corpus_under_other_names(tmp_path, capsys):
    save_sealed(build_model(save_llm(tmp_path / "llm"), "mean"), tmp_path / "teacher")
    rows = write(tmp_path, ".csv", [{"question": f"how {i}?", "answer": f"so {i}"} for i in range(6)])
    corpus = tmp_path / "corpus.csv"
    corpus.write_text("headline,body\n" + "".join(f"Title {i},Body {i}\n" for i in range(9)))
    command = ["mine", str(rows), str(tmp_path / "teacher"), "--columns", "anchor=question", "positive=answer"]
    command += ["--corpus", str(corpus), "--corpus-columns", "text=body", "title=headline"]
    command += ["--output", str(tmp_path / "mined"), "--num-negatives", "2", "--relative-margin", "none"]
    assert main(command) == 0
    mined = [json.loads(line) for line in (tmp_path / "mined" / "train.jsonl").read_text().splitlines()]
    assert len(mined) == 6 and mined[0]["anchor"] == "how 0?"
    documents = {f"Title {i} Body {i}" for i in range(9)} | {f"so {i}" for i in range(6)}
    assert {row[f"negative_{n}"] for row in mined for n in (1, 2)} <= documents
    with pytest.raises(SystemExit):
        main([*command[:3], "--columns", "anchor", "--output", "x"])
    assert "renames no column. Write OURS=THEIRS" in capsys.readouterr().err
    assert len(load_corpus(corpus, {"text": "body"})) == 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2,3\n4,5,6\n", "Line 2 of .* has 3 fields, and the first line names 2 columns"),
        ("a,b\nhow, do I pay?,by card\n", "Line 2 of .*has 3 fields.* into quotes"),
        ("a,b\n1\n", "Line 2 of .* has 1 fields"),
        (",a,b\n0,x,y\n", "must name the columns, each once"),
        ("a,b,b\n1,2,3\n", "must name the columns, each once"),
        ("a,b\n1,2\n\r3,4\r5,6\n", "cannot be read|has 1 fields"),
        ('a,b\n"1,2\n', "cannot be read: unexpected end of data"),
        ("a,b\ncaf\xe9,2\n".encode("latin-1"), "Line 2 of .* is not UTF-8 text"),
        ("", "is empty"),
    ],
)
def test_a_csv_file_that_says_something_else_is_refused_by_its_line(tmp_path, content, message):
    file = tmp_path / "rows.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (load_rows, lambda path: list(load_rows(path, streaming=True))):
        with pytest.raises(ValueError, match=message):
            read(file)


def test_names_endings_and_states_of_files(tmp_path):
    """A pattern in a name is its name; endings in capitals; a file that changes is read anew; a byte order mark."""
    for name in ("we[1].csv", "st*r.csv", "x.CSV", "bom.csv"):
        text = "\ufeffa,b\r\nx,y\r\n" if name == "bom.csv" else "a,b\nx,y\n"
        (tmp_path / name).write_text(text, newline="")
        assert list(load_rows(tmp_path / name)) == [{"a": "x", "b": "y"}], name
    (tmp_path / "x.CSV").write_text("a,b\nz,y\n")
    assert list(load_rows(tmp_path / "x.CSV")) == [{"a": "z", "b": "y"}]
    (tmp_path / "j[1].jsonl").write_text('{"a": "x"}\n')
    assert list(load_rows(tmp_path / "j[1].jsonl")) == [{"a": "x"}]
    swapped = {"a": "b", "b": "a"}
    for streaming in (False, True):
        assert list(load_rows(tmp_path / "bom.csv", streaming, swapped)) == [{"a": "y", "b": "x"}]


@pytest.mark.parametrize("name", ["ROWS.CSV.GZ", "rows.csv.GZ", "rows.Tsv.Gz", "rows.JSONL.GZ", "rows.JSON.gZ"])
def test_the_end_of_a_name_may_be_in_capitals(tmp_path, name):
    lower, rows = name.lower(), [{"a": "x", "b": "y"}, {"a": "u", "b": "007"}]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    for ending, delimiter in ((".csv.gz", ","), (".tsv.gz", "\t")):
        if lower.endswith(ending):
            content = "".join(delimiter.join(values) + "\n" for values in (rows[0], *(row.values() for row in rows)))
    (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    for streaming in (False, True):
        assert list(load_rows(tmp_path / name, streaming)) == rows
    assert from_columns(tmp_path / name, anchor="a", positive="b")["positive"][:] == ["y", "007"]


JSON_ROWS = [
    {"a": "null", "b": "007", "created_at": "1500000000", "n": 1, "more": {"p": ["x"]}},
    {
        "a": 'a, [b] {c}\nand \\"d"\\',
        "b": "日本語 \u2028 café",
        "created_at": "2020-01-01",
        "n": None,
        "more": {"p": []},
    },
    {"a": "2020", "b": "1e5", "created_at": "soon", "n": 2**53 + 1, "more": {"p": ["y", "]"]}, "only": "here"},
]


@pytest.mark.parametrize("ending", [".json", ".json.gz", ".jsonl", ".JSON"])
def test_an_array_gives_the_rows_of_json_lines(tmp_path, monkeypatch, ending):
    """However it is laid out, wherever a block of it ends, and the larger than any line."""
    monkeypatch.setattr("st_llm_embed.data.json_arrays.BLOCK", 7)
    monkeypatch.setattr("st_llm_embed.data.text_files.LONGEST_LINE", 500)
    rows = JSON_ROWS * 4
    forms = {
        "lines": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "array": json.dumps(rows),
        "indented": "\ufeff \r\n" + json.dumps(rows, indent=2, ensure_ascii=False) + "\n\n",
    }
    assert len(forms["array"]) > 500
    found = {}
    for form, content in forms.items():
        file = tmp_path / f"{form}{ending}"
        data = content.encode()
        file.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
        found[form] = [
            *(list(load_rows(file, streaming)) for streaming in (False, True)),
            *(list(from_columns(file, anchor="a", positive="b", streaming=streaming)) for streaming in (False, True)),
        ]
    assert found["array"] == found["indented"] == found["lines"]
    loaded, streamed, built, _ = found["array"]
    assert loaded == streamed == [{"only": None, **row} for row in rows]
    assert [row["positive"] for row in built] == [row["b"] for row in JSON_ROWS]  # each pair once


def test_an_array_of_texts_and_one_that_changes(tmp_path):
    file = tmp_path / "texts.json"
    for texts in (["one", 'two "three"'], ["four"]):
        file.write_text(json.dumps(texts))
        assert list(load_rows(file)) == [{"text": text} for text in texts]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds an array without rows"),
        ('[{"a": "x"}, 7]', "Row 2 of .* is no JSON object such as .*: 7"),
        ('[{"a": "x"}, [1]]', "Row 2 of .* is no JSON object"),
        ('[{"a": "x"},]', "Row 2 of .* is no JSON object"),
        ('[{"a": "x"}, {"a" "y"}]', "Row 2 of .* is not JSON.*Expecting ':' delimiter"),
        ('[{"a": "x"}, {"a": "y"', "Row 2 of .* is not JSON"),
        ('[{"a": "x"}', "Row 1 of .* is not followed by a comma or by the array's end"),
        ('[{"a": "x"} {"a": "y"}]', "Row 1 of .* is not followed by a comma"),
        ('[{"a": "x"}]\n{"a": "y"}', "Row 1 of .* is not followed by .* the array's end, which ends the file"),
        ('[{"a": ' + "9" * 5000 + "}]", "Row 1 of .* is not JSON: Exceeds the limit"),
        ('[{"a": ' + "[" * 100_000, "Row 1 of .* is not JSON"),
        ('[{"a": "caf\xe9"}]'.encode("latin-1"), "is not UTF-8 text"),
        ('[{"a": "' + "x" * (LONGEST_LINE + (2 << 20)) + '"}]', "Row 1 of .* is not JSON, or too long for a text"),
    ],
    ids=range(13),
)
def test_an_array_that_says_something_else_is_refused_by_its_row(tmp_path, content, message):
    file = tmp_path / "rows.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (load_rows, lambda path: from_columns(path, anchor="a", positive="a")):
        with pytest.raises(ValueError, match=message):
            read(file)


def test_spreadsheets_and_archives_are_refused_with_the_fix(tmp_path):
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("rows.csv", "a,b\nx,y\n")
    content = (tmp_path / "rows.zip").read_bytes()
    (tmp_path / "old.xls").write_bytes(b"\xd0\xcf\x11\xe0" + bytes(100))
    for name in ("rows.xlsx", "ROWS.XLSX", "rows.csv", "rows.jsonl", "rows", "rows.txt"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(content))
    (tmp_path / "text.ods").write_text('{"a": "x", "b": "y"}\n')
    for file in tmp_path.iterdir():
        for read in (load_rows, lambda path: from_columns(path, anchor="a", positive="b")):
            with pytest.raises(ValueError, match=f"{re.escape(str(file))} is a spreadsheet or a ZIP archive.* as CSV"):
                read(file)
    with pytest.raises(FileNotFoundError, match=r"There is no file or folder none.xlsx"):
        load_rows("none.xlsx")


def test_a_folder_of_texts_is_texts_only(tmp_path):
    texts = tmp_path / "texts"
    (texts / "more").mkdir(parents=True)
    for name in ("a.txt", "b[1].TXT", "more/c.txt", ".DS_Store"):
        (texts / name).write_text(f"{name} one.\n\n{name} two.")
    assert len(load_rows(texts)) == 3
    (texts / "rows.csv").write_text("a\n1\n")
    with pytest.raises(ValueError, match="holds .txt files and others, such as rows.csv"):
        load_rows(texts)
