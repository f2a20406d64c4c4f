"""Sentence pairs, inference and classes to rows, against sets computed by hand."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, IterableDataset

from st_llm_embed.data import (
    check_contrastive_columns,
    from_class_examples,
    from_class_labels,
    from_nli,
    from_parallel_text,
    from_sts,
)


def tuples(dataset: Dataset | IterableDataset) -> list[tuple[str, ...]]:
    return [tuple(row.values()) for row in dataset]


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.open(file, "rt", encoding="utf-8")]


STS = Dataset.from_dict(
    {
        "sentence1": ["a cat", "a dog", "a cow", "same", "ein Hund", " a cat "],
        "sentence2": ["one cat", "two dogs", "", "same", "日本", "one cat"],
        "score": [5.0, 3.9, 4.5, 5.0, 4.0, 4.1],
    }
)


def test_sts():
    counts = Counter()
    made = from_sts(STS, counts=counts)
    pairs = [("a cat", "one cat"), ("ein Hund", "日本")]
    assert tuples(made) == [row for a, b in pairs for row in ((a, b), (b, a))]
    assert +counts == {
        "read": 10,
        "rows": 4,
        "below threshold": 1,
        "identical": 2,
        "empty": 2,
        "duplicates": 2,
        "no positive": 3,
    }
    check_contrastive_columns(made, "made", negatives=0)
    stream = from_sts(STS.to_iterable_dataset())
    assert isinstance(stream, IterableDataset) and tuples(stream) == tuples(made)
    fifths = STS.map(lambda row: {"score": row["score"] / 5})
    assert tuples(from_sts(fifths, threshold=0.8, scale=(0, 1))) == tuples(made)
    with pytest.raises(ValueError, match=r"Row 0 has the score 5.0, outside scale=\(0, 1\). Fix: give the scale"):
        from_sts(STS, threshold=0.8, scale=(0, 1))
    with pytest.raises(ValueError, match="No row is left of what was read: {'below threshold': 6}"):
        from_sts(fifths)
    with pytest.raises(ValueError, match=r"threshold=80 is outside scale=\(0.0, 5.0\)"):
        from_sts(STS, threshold=80)
    with pytest.raises(ValueError, match="Row 0 has the score nan"):
        from_sts(STS.map(lambda row: {"score": float("nan")}))
    with pytest.raises(ValueError, match=r"and not \['sentence1'\]. Fix: .*sentence1=.*{'yours': 'sentence1'}"):
        from_sts(STS.rename_columns({"sentence1": "text1"}), streaming=True)
    assert tuples(from_sts(STS.rename_columns({"sentence1": "text1"}), sentence1="text1")) == tuples(made)


def test_sts_of_a_real_set(shared):
    file = shared / "data" / "sick_r" / "train.jsonl.gz"
    high = [(r["sentence1"].strip(), r["sentence2"].strip()) for r in read(file) if r["score"] >= 4]
    assert set(tuples(from_sts(file))) == {row for a, b in high if a != b for row in ((a, b), (b, a))}


def test_parallel_text():
    both = from_parallel_text(STS, counts=(counts := Counter()))
    there = from_parallel_text(STS, both_directions=False)
    pairs = [("a cat", "one cat"), ("a dog", "two dogs"), ("ein Hund", "日本")]
    assert tuples(there) == pairs and counts["identical"] == 2
    assert tuples(both) == [row for a, b in pairs for row in ((a, b), (b, a))]
    assert tuples(from_parallel_text(STS, streaming=True)) == tuples(both)


NLI = {
    "sentence1": ["A man runs.", "B", "A man runs.", "B", "C", "A man runs. ", "C", "B", "D"],
    "sentence2": ["He moves.", "yes", "He sits.", "no", "maybe", "He lies.", "yes", "yes", ""],
    "label": [0, 0, 2, 2, 1, 2, 0, 2, 0],  # B: "yes" is both entailed and contradicted
}


def test_nli():
    counts = Counter()
    numbers = Dataset.from_dict(NLI)
    made = from_nli(numbers, entailment=0, contradiction=2, counts=counts)
    assert [row[:2] for row in tuples(made)] == [("A man runs.", "He moves."), ("B", "yes")]
    assert tuples(made)[0][2] in ("He sits.", "He lies.") and tuples(made)[1][2] == "no"
    assert +counts == {
        "read": 4,
        "rows": 2,
        "contradictions": 1,
        "too few negatives": 1,
        "empty": 1,
        "no positive": 1,
    }
    named = numbers.cast_column("label", ClassLabel(names=["entailment", "neutral", "contradiction"]))
    assert tuples(from_nli(named)) == tuples(made)
    assert tuples(from_nli(named.to_iterable_dataset())) == tuples(made)
    pairs = from_nli(numbers, entailment=0, negatives=0)
    assert tuples(pairs) == [("A man runs.", "He moves."), ("B", "yes"), ("C", "yes")]
    two = from_nli(numbers, entailment=0, contradiction=2, negatives=2)
    assert tuples(two) == [("A man runs.", "He moves.", "He sits.", "He lies.")]
    with pytest.raises(
        ValueError, match=r"No row has \['contradiction', 'entailment'\] in 'label', .*\[0, 1, 2\]. Fix"
    ):
        from_nli(numbers)
    with pytest.raises(ValueError, match=r"No row has \['contradiction'\] .*negatives=0 needs no contradictions"):
        from_nli(named.filter(lambda row: row["label"] != 2))


def test_nli_of_a_real_set(shared):
    file = shared / "data" / "sick_nli" / "train.jsonl.gz"
    judged = {name: Counter() for name in ("entailment", "contradiction")}
    for row in read(file):
        if row["label_text"] in judged:
            judged[row["label_text"]][row["sentence1"].strip(), row["sentence2"].strip()] += 1
    against = {}
    for premise, text in judged["contradiction"]:
        against.setdefault(premise, set()).add(text)
    made = from_nli(file, label="label_text")
    expected = {(a, b) for a, b in judged["entailment"] if a != b and against.get(a, set()) - {a, b}}
    assert {row[:2] for row in tuples(made)} == expected and len(made) == len(expected) > 100
    assert all(row[2] in against[row[0]] for row in tuples(made))


TEXTS = {0: ["red", "blue", "green", "pink"], 1: ["one", "two", "three"], 2: ["sun", "moon"]}
CLASSES = Dataset.from_list(
    [{"text": text, "label": label} for label, texts in TEXTS.items() for text in texts]
    + [{"text": " red ", "label": 0}, {"text": "both", "label": 0}, {"text": "both", "label": 2}]
    + [{"text": "", "label": 1}]
)
LABEL_OF = {text: label for label, texts in TEXTS.items() for text in texts}


def test_class_examples():
    """Every text is an anchor once; what is drawn is right, and over many seeds nothing that may be drawn is not."""
    counts = Counter()
    made = from_class_examples(CLASSES, negatives=3, counts=counts)
    assert +counts == {"read": 9, "rows": 9, "duplicates": 1, "contradictions": 1, "empty": 1}
    assert made["anchor"][:] == list(LABEL_OF)
    drawn = {text: (set(), set()) for text in LABEL_OF}
    for seed in range(60):
        for anchor, positive, *negatives, label in tuples(from_class_examples(CLASSES, negatives=3, seed=seed)):
            assert label == LABEL_OF[anchor]
            assert positive != anchor and LABEL_OF[positive] == LABEL_OF[anchor]
            assert len({*negatives}) == 3 and all(LABEL_OF[text] != LABEL_OF[anchor] for text in negatives)
            drawn[anchor][0].add(positive)
            drawn[anchor][1].update(negatives)
    for text, label in LABEL_OF.items():
        assert drawn[text] == (set(TEXTS[label]) - {text}, set(LABEL_OF) - set(TEXTS[label]))
    assert tuples(made) == tuples(from_class_examples(CLASSES, negatives=3))
    assert tuples(made) != tuples(from_class_examples(CLASSES, negatives=3, seed=1))
    assert tuples(made) == tuples(from_class_examples(CLASSES.to_iterable_dataset(), negatives=3))
    named = CLASSES.map(lambda row: {"kind": "zab"[row["label"]]})  # numbered by first appearance, not by name
    assert tuples(from_class_examples(named, label="kind", negatives=3)) == tuples(made)


def test_class_labels():
    counts = Counter()
    names = {0: "colour", 1: "number", 2: "heavenly body"}
    made = from_class_labels(CLASSES, label_texts=names, counts=counts)
    assert +counts == {"read": 9, "rows": 9, "duplicates": 1, "contradictions": 1, "empty": 1}
    for anchor, positive, *negatives in tuples(made):
        assert positive == names[LABEL_OF[anchor]] and {positive, *negatives} == set(names.values())
    named = CLASSES.cast_column("label", ClassLabel(names=list(names.values())))
    assert tuples(from_class_labels(named)) == tuples(made)
    texts = CLASSES.map(lambda row: {"kind": names[row["label"]]})
    assert tuples(from_class_labels(texts, label="kind")) == tuples(made)
    one = from_class_labels(named, negatives=1)
    assert {row[2] for row in tuples(one)} == set(names.values())
    assert tuples(one) != tuples(from_class_labels(named, negatives=1, seed=1))
    binary = CLASSES.filter(lambda row: row["label"] < 2)
    made = from_class_labels(binary, label_texts={0: "good", 1: "bad"})
    assert {row[1:] for row in tuples(made)} == {("good", "bad"), ("bad", "good")}


def test_bad_classes_are_named():
    alone = Dataset.from_list([*CLASSES, {"text": "pi", "label": 3}, {"text": "pi ", "label": 3}])
    with pytest.raises(ValueError, match=r"The class 3 has one text .*row\['label'\] != 3\), or from_class_labels"):
        from_class_examples(alone, negatives=3)
    assert len(from_class_labels(alone, label_texts={0: "a", 1: "b", 2: "c", 3: "d"})) == 10
    with pytest.raises(ValueError, match="Outside the class 0 there are 5 texts, too few for negatives=7"):
        from_class_examples(CLASSES)
    with pytest.raises(ValueError, match=r"The labels \[0, 1, 2\] have no text. Fix: label_texts={0: "):
        from_class_labels(CLASSES)
    with pytest.raises(ValueError, match=r"\['a', 'b', 'c'\] are too few for negatives=3"):
        from_class_labels(CLASSES, label_texts={0: "a", 1: "b", 2: "c"}, negatives=3)
    for one in (CLASSES.filter(lambda row: row["label"] == 0), CLASSES.filter(lambda row: not row["text"])):
        with pytest.raises(ValueError, match="are too few for negatives=None"):
            from_class_labels(one, label_texts={0: "a", 1: "b"})
    with pytest.raises(ValueError, match="Row 1 has no 'label'. Fix: dataset.filter"):
        from_class_examples(Dataset.from_dict({"text": ["a", "b"], "label": [1, None]}))
    with pytest.raises(ValueError, match="The source is empty"):
        from_class_examples(CLASSES.select([]))
    with pytest.raises(ValueError, match=r"has the columns \['text', 'label'\], and not \['intent'\]. Fix: .*label="):
        from_class_labels(CLASSES, label="intent")


def test_classes_of_a_real_set(shared):
    file = shared / "data" / "banking77" / "train.jsonl.gz"
    label_of = {row["text"].strip(): row["label_text"] for row in read(file)}
    made = from_class_examples(file)
    assert set(made["anchor"]) == set(label_of) and made.num_columns == 10
    assert len({(row["label"], label_of[row["anchor"]]) for row in made}) == len(set(label_of.values())) == 77
    for anchor, positive, *negatives, _ in tuples(made.select(range(0, len(made), 50))):
        assert positive != anchor and label_of[positive] == label_of[anchor]
        assert all(label_of[text] != label_of[anchor] for text in negatives)
    labels = from_class_labels(file, label="label_text")
    assert len(labels) == len(made) and labels.column_names == made.column_names[:9]
    assert all(label_of[row["anchor"]] == row["positive"] for row in labels)


@pytest.mark.parametrize("label", [["entailment"], {"x": 1}])
@pytest.mark.parametrize("read", [from_nli, from_class_examples, from_class_labels])
def test_a_label_is_one_value(read, label):
    rows = Dataset.from_list([{"text": "a", "sentence1": "a", "sentence2": "b", "label": label}] * 2)
    with pytest.raises(
        ValueError, match=r"Row 0 has the label .*A label is text or a number, and a row has one\. Fix"
    ):
        read(rows)
