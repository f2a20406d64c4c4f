"""Raw text to pretext rows: nothing crosses a document, streams give the same, what is dropped is counted."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from datasets import Dataset, load_dataset
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch.utils.data import DataLoader

from st_llm_embed.data import consecutive_texts, paragraphs, sentences, windows

DOCUMENTS = ["one\n\ntwo\nlines\n  \n\nthree", "alone", "one\n\ntwo lines", "", " \n "]


def test_paragraphs_follow_each_other_inside_a_document():
    counts = Counter()
    rows = consecutive_texts(DOCUMENTS, counts=counts)
    assert rows.to_dict() == {"text": ["one", "two lines"], "next": ["two lines", "three"]}
    assert counts == {"documents": 5, "rows": 2, "duplicates": 1, "empty": 2, "without next": 1}
    with pytest.raises(ValueError, match="of 2 documents, 1 are empty and 1 have one text only. Split more finely"):
        consecutive_texts(["alone", ""])
    stream = consecutive_texts(Dataset.from_dict({"text": ["alone", ""]}).to_iterable_dataset())
    with pytest.raises(ValueError, match="of 2 documents, 1 are empty and 1 have one text only. Split more finely"):
        list(stream)


def test_the_last_text_of_a_document_is_a_row_where_it_is_asked_for():
    counts = Counter()
    rows = consecutive_texts(DOCUMENTS, keep_last=True, counts=counts)
    expected = [("one", "two lines"), ("two lines", "three"), ("three", ""), ("alone", ""), ("two lines", "")]
    assert [(row["text"], row["next"]) for row in rows] == expected
    assert counts == {"documents": 5, "rows": 5, "duplicates": 1, "empty": 2, "without next": 0}
    with pytest.raises(ValueError, match="of 1 documents, 1 are empty"):
        consecutive_texts([""], keep_last=True)


def test_every_form_of_documents_gives_the_same_rows():
    whole = Dataset.from_dict({"text": DOCUMENTS, "title": list("abcde")})
    texts = [(number, text) for number, document in enumerate(DOCUMENTS) for text in paragraphs(document)]
    rows = Dataset.from_dict({"doc": [number for number, _ in texts], "text": [text for _, text in texts]})
    expected = consecutive_texts(DOCUMENTS).to_list()
    assert consecutive_texts(whole).to_list() == expected
    assert consecutive_texts([paragraphs(document) for document in DOCUMENTS]).to_list() == expected
    assert consecutive_texts(rows, document_column="doc").to_list() == expected
    for data, column in ((whole, None), (rows, "doc")):
        counts = Counter()
        stream = consecutive_texts(data.to_iterable_dataset(), document_column=column, counts=counts)
        assert not counts  # nothing is read before it is asked for
        assert list(stream) == expected and counts["rows"] == 2 and counts["duplicates"] == 1
        assert list(stream) == expected  # a second epoch has no duplicates of the first
        batches = list(DataLoader(stream, batch_size=2, num_workers=1))
        assert batches == [{"text": ["one", "two lines"], "next": ["two lines", "three"]}]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("It rains. It pours!\nWhy? Nobody knows…", ["It rains.", "It pours!", "Why?", "Nobody knows…"]),
        ("He said “Go.” She went. (They did not.) 3 stayed.", None),
        ("Dr. W. H. Smith of St. Ives cites Fig. 3, e.g. Mr. Pi: 3.14 vs. 2.71. Fine.", None),
        ("no end", ["no end"]),
        ("A heading\n\nA text. 次の文。日本語です！「はい。」終わり", None),
        ("", []),
    ],
)
def test_sentences(document, expected):
    expected = expected or {
        "He": ["He said “Go.”", "She went.", "(They did not.)", "3 stayed."],
        "Dr": ["Dr. W. H. Smith of St. Ives cites Fig. 3, e.g. Mr. Pi: 3.14 vs. 2.71.", "Fine."],
        "A ": ["A heading", "A text.", "次の文。", "日本語です！", "「はい。」", "終わり"],
    }.get(document[:2], [])
    assert sentences(document) == expected


@pytest.mark.parametrize("characters", [2, 7, 20, 1000])
def test_windows_lose_nothing(characters):
    document = "The quick brown fox\njumps over   antidisestablishmentarianism and 日本語のとても長い文章です"
    texts = windows(characters)(document)
    assert "".join(texts).replace(" ", "") == re.sub(r"\s", "", document)
    assert all(0 < len(text) <= characters and text == text.strip() for text in texts)
    if characters == 20:
        assert texts[:2] == ["The quick brown fox", "jumps over"]
    with pytest.raises(ValueError, match=r"windows\(characters=1\) must be at least 2"):
        windows(1)


def test_texts_are_cut_and_stop_words_left_out_of_targets():
    documents = ["The cat's name is Tom. It sat on the mat, and it was not mine! And the of."]
    rows = consecutive_texts(documents, sentences, stop_words=ENGLISH_STOP_WORDS)
    assert rows.column_names == ["text", "next", "target"]
    assert rows[0] == {"text": "The cat's name is Tom.", "next": "sat mat", "target": "cat's Tom"}
    assert rows[1] == {"text": "It sat on the mat, and it was not mine!", "next": "", "target": "sat mat"}
    short = consecutive_texts(documents, sentences, max_characters=12)
    assert short[0] == {"text": "The cat's", "next": "It sat on"}


def test_data_sets_without_the_columns_are_refused():
    data = Dataset.from_dict({"content": ["a\n\nb"]})
    for form in (data, data.to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"have the columns \['content'\] and lack \['text'\]. Rename yours"):
            consecutive_texts(form)
    with pytest.raises(ValueError, match=r"lack \['doc'\]"):
        consecutive_texts(data.rename_column("content", "text"), document_column="doc")


def test_ordered_paragraphs_of_wikipedia(shared):
    """A real file as it streams: every row's texts are neighbours in one article."""
    file = str(shared / "data" / "wikipedia_en" / "test.jsonl.gz")
    source = load_dataset("json", data_files=file, split="train", streaming=True)
    counts = Counter()
    rows = list(consecutive_texts(source, document_column="doc", counts=counts))
    order = [(row["doc"], " ".join(row["text"].split())) for row in source]
    neighbours = {(a, b) for (doc, a), (other, b) in zip(order, order[1:], strict=False) if doc == other}
    assert {(row["text"], row["next"]) for row in rows} == neighbours
    assert counts["rows"] == len(rows) == len(neighbours) > 2000
    assert counts["documents"] == len({doc for doc, _ in order})
