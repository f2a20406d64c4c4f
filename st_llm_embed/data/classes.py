"""Classification and clustering to rows: by the examples of the classes, or by the texts of their labels.

NV-Embed (arXiv 2405.17428, section 4): version 2 takes another text of the class as the positive and texts of other
classes as negatives, version 1 the label's text and the other labels' texts. Of two classes, such as positive and
negative reviews, both take the labels' texts.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset

from .normal_form import normal_form
from .rows import Judged, contrastive_dataset
from .sources import Label, Source, check_source, label_names, one_label, source_rows, stripped

NEGATIVES = 7  # hard negatives for each query in NV-Embed


def from_class_examples(
    source: Source,
    *,
    text: str = "text",
    label: str = "label",
    negatives: int = NEGATIVES,
    seed: int = 0,
    counts: Counter[str] | None = None,
) -> Dataset:
    """Each text with another of its class, and with ``negatives`` texts of other classes, all chosen by the seed.

    The source is read to its end and held in memory. A text of two classes is a contradiction: it is dropped. The
    column ``label`` has the class's number, by first appearance: so in-batch negatives spare the class.

    Args:
        source: a ``Dataset``, or what ``load_rows`` reads: a CSV, TSV, Parquet or JSON lines file, ...
        text, label: the names of the columns of texts and of labels. Labels may be numbers or text.
        negatives, seed, counts: see ``contrastive_dataset``.

    Raises:
        FileNotFoundError: for a path that is no file.
        ValueError: for columns that are not there, a text without label, or a class of one text, naming it; see also
            ``contrastive_dataset``.
    """
    check_source(source, {text: "text", label: "label"})
    reading_counts: Counter[str] = Counter()
    label_of = _labelled_texts(source, text, label, reading_counts)

    def judged(counted: Counter[str]) -> Iterator[Judged]:
        counted.update(reading_counts)
        classes: dict[Label, list[str]] = {}
        for example, example_label in label_of.items():
            classes.setdefault(example_label, []).append(example)
        if single := [class_label for class_label, examples in classes.items() if len(examples) == 1]:
            raise ValueError(
                f"The class {single[0]!r} has one text ({len(single)} such classes), so no other can be its positive. "
                f"Fix: dataset.filter(lambda row: row[{label!r}] != {single[0]!r}), or from_class_labels, which needs "
                "no second one."
            )
        # All texts class by class: those of the other classes are what is left without one slice.
        ordered = [example for examples in classes.values() for example in examples]
        place = {example: i for i, example in enumerate(ordered)}
        start = {class_label: place[examples[0]] for class_label, examples in classes.items()}
        for example, example_label in label_of.items():
            choose = random.Random(f"{seed}\n{example}")
            first, size = start[example_label], len(classes[example_label])
            other = choose.randrange(size - 1)
            positive = classes[example_label][other + (other >= place[example] - first)]
            if negatives > (outside := len(ordered) - size):
                raise ValueError(
                    f"Outside the class {example_label!r} there are {outside} texts, too few for {negatives=}."
                )
            chosen = choose.sample(range(outside), negatives)
            yield Judged(
                f"Text {example[:60]!r}", example, [positive], [ordered[i + size * (i >= first)] for i in chosen]
            )

    rows = contrastive_dataset(judged, negatives=negatives, seed=seed, counts=counts)
    numbers = {class_label: number for number, class_label in enumerate(dict.fromkeys(label_of.values()))}
    return rows.add_column("label", [numbers[label_of[anchor]] for anchor in rows["anchor"][:]])


def from_class_labels(
    source: Source,
    *,
    text: str = "text",
    label: str = "label",
    label_texts: Mapping[Any, str] | None = None,
    negatives: int | None = None,
    seed: int = 0,
    counts: Counter[str] | None = None,
) -> Dataset:
    """Each text with its label's text, and with ``negatives`` of the other labels' texts.

    The source is read to its end and held in memory. A text of two classes is a contradiction: it is dropped. There is
    no column ``label``: a class's rows share their positive, and no row takes its own positive as in-batch negative.

    Args:
        source: a ``Dataset``, or what ``load_rows`` reads: a CSV, TSV, Parquet or JSON lines file, ...
        text, label: the names of the columns of texts and of labels.
        label_texts: the text of each label. Default: the names of a ``ClassLabel`` column, or the labels themselves
            where they are text.
        negatives: how many of the other labels' texts each row gets as hard negatives. Default: 7, or all where there
            are fewer.
        seed, counts: see ``contrastive_dataset``.

    Raises:
        FileNotFoundError: for a path that is no file.
        ValueError: for columns that are not there, a text without label, a label without text, or fewer than two
            labels; see also ``contrastive_dataset``.
    """
    check_source(source, {text: "text", label: "label"})
    names = label_names(source, label) if label_texts is None else label_texts
    reading_counts: Counter[str] = Counter()
    label_of = _labelled_texts(source, text, label, reading_counts)
    labels = list(dict.fromkeys(label_of.values()))
    named = [names.get(class_label, class_label) for class_label in labels]
    if unnamed := [name for name in named if not isinstance(name, str)]:
        raise ValueError(
            f"The labels {unnamed[:5]} have no text. Fix: label_texts={{{unnamed[0]!r}: 'what it is called', ...}}, "
            "or label='the column of their texts'."
        )
    texts = [name for name in named if isinstance(name, str)]
    others = len(texts) - 1
    count = min(NEGATIVES, others) if negatives is None else negatives
    if others < max(count, 1):
        raise ValueError(f"A row's negatives are the other labels' texts: {texts} are too few for {negatives=}.")

    def judged(counted: Counter[str]) -> Iterator[Judged]:
        counted.update(reading_counts)
        for example, example_label in label_of.items():
            place = labels.index(example_label)
            yield Judged(f"Text {example[:60]!r}", example, [texts[place]], [*texts[:place], *texts[place + 1 :]])

    return contrastive_dataset(judged, negatives=count, seed=seed, counts=counts)


def _labelled_texts(source: Source, text: str, label: str, counts: Counter[str]) -> dict[str, Label]:
    """The label of each distinct text that has only one."""
    label_of: dict[str, Label] = {}
    first_spelling: dict[str, str] = {}  # by normal form
    ambiguous = set()
    for where, row in source_rows(source, {text: "text", label: "label"}):
        example, example_label = stripped(row[text], where), one_label(row[label], where)
        if example_label is None:
            raise ValueError(f"{where} has no {label!r}. Fix: dataset.filter(lambda row: row[{label!r}] is not None).")
        spelling = first_spelling.setdefault(normal_form(example), example)
        if not example:
            counts["empty"] += 1
        elif spelling not in label_of:
            label_of[spelling] = example_label
        elif label_of[spelling] == example_label:
            counts["duplicates"] += 1
        else:
            ambiguous.add(spelling)
    counts["contradictions"] += len(ambiguous)
    return {example: its_label for example, its_label in label_of.items() if example not in ambiguous}
