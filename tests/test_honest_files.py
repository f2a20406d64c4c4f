"""Data files and configurations that were made to fill the memory or the disk end in one message, and honest ones do
not meet the bounds."""

from __future__ import annotations

import gzip
import json

import pytest
from datasets import Dataset

from st_llm_embed.data.corpus import load_corpus, read_corpus
from st_llm_embed.data.sources import load_rows
from st_llm_embed.data.text_files import LONGEST_LINE, UNPACKED, read_json_lines, read_lines
from st_llm_embed.training.configuration import MOST_PARTS, read_yaml


def test_a_line_without_an_end_is_not_read_to_it(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": "' + b"a" * LONGEST_LINE + b'"}\n{"text": "b"}\n')
    for read in (lambda: list(read_lines(file)), lambda: load_rows(str(file))):
        with pytest.raises(ValueError, match="Line 2 of .*rows.jsonl is longer than 33,554,432 bytes"):
            read()


def test_a_long_text_is_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    text = "a" * (LONGEST_LINE - 100)
    file.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "b"}) + "\n")
    assert [len(row["text"]) for _, row in read_json_lines(file)] == [len(text), 1]
    assert [len(row["text"]) for row in load_rows(str(file))] == [len(text), 1]


def test_an_archive_that_would_fill_the_disk_is_not_unpacked(tmp_path):
    file, line = tmp_path / "rows.jsonl.gz", json.dumps({"text": "a" * 1000}) + "\n"
    part = gzip.compress(line.encode() * 100_000)
    file.write_bytes(part * (2 + UNPACKED // (len(line) * 100_000)))
    for read in (lambda: sum(1 for _ in read_lines(file)), lambda: load_rows(str(file))):
        with pytest.raises(ValueError, match="rows.jsonl.gz unpacks to more than 200 times its size"):
            read()


@pytest.mark.parametrize("line", ["[" * 100_000, '{"x": ' + "9" * 5000 + "}"])
def test_what_the_parser_gives_up_on_names_its_line(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="Line 1 of .*rows.jsonl is not JSON"):
        list(read_json_lines(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("where", ["model: {{base: *a9}}", "data: {{x: *a9}}", "unknown: *a9"])
def test_anchors_that_multiply_are_refused(tmp_path, where):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    file = tmp_path / "config.yaml"
    file.write_text("\n".join([*lines, where.format()]))
    with pytest.raises(ValueError, match=r"config.yaml has 2e\+10 keys and values once its anchors are followed"):
        read_yaml(file)
    file.write_text("a: &a {b: *a}")
    with pytest.raises(ValueError, match="inf keys and values"):
        read_yaml(file)


def test_anchors_of_honest_files_are_read(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("a: &a {learning_rate: 2e-5}\nb: *a\nc: [" + "1, " * (MOST_PARTS // 2) + "1]\n")
    assert read_yaml(file)["b"] == {"learning_rate": 2e-5}


def test_nothing_is_written_beside_a_corpus_on_disk(tmp_path):
    Dataset.from_dict({"title": ["A", "B"], "text": ["cat", "dog"]}).save_to_disk(str(tmp_path / "corpus"))
    before = sorted(file.name for file in (tmp_path / "corpus").iterdir())
    assert list(read_corpus(load_corpus(str(tmp_path / "corpus")))["text"]) == ["A cat", "B dog"]
    assert sorted(file.name for file in (tmp_path / "corpus").iterdir()) == before
