"""Natural-language inference to rows: what a premise entails is its positive, what contradicts it a hard negative."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from datasets import Dataset

from .normal_form import normal_form
from .rows import Judged, contrastive_dataset
from .sources import Source, check_source, label_names, one_label, source_rows, stripped


def from_nli(
    source: Source,
    *,
    premise: str = "sentence1",
    hypothesis: str = "sentence2",
    label: str = "label",
    entailment: int | str = "entailment",
    contradiction: int | str = "contradiction",
    negatives: int = 1,
    seed: int = 0,
    counts: Counter[str] | None = None,
) -> Dataset:
    """Each premise with each hypothesis that it entails, and with ``negatives`` of those that contradict it.

    Rows of one premise are brought together, so the source is read to its end and held in memory. Premises with fewer
    contradictions than ``negatives`` are dropped and counted.

    Args:
        source: a ``Dataset``, or what ``load_rows`` reads: a CSV, TSV, Parquet or JSON lines file, ...
        premise, hypothesis, label: the names of the columns of premises, hypotheses and labels.
        entailment, contradiction: the values of these two labels; of a ``ClassLabel`` column, their names. Rows with
            other labels (neutral, no gold label) are neither positives nor negatives.
        negatives, seed, counts: see ``contrastive_dataset``; 0 for pairs.

    Raises:
        FileNotFoundError: for a path that is no file.
        ValueError: for columns or labels that are not there; see also ``contrastive_dataset``.
    """
    columns = {premise: "premise", hypothesis: "hypothesis", label: "label"}
    check_source(source, columns)
    names = label_names(source, label)
    needed = {entailment, contradiction} if negatives else {entailment}

    def judged(_: Counter[str]) -> Iterator[Judged]:
        groups: dict[str, tuple[str, str, list[str], list[str]]] = {}  # by the premise's normal form
        seen_labels = set()
        for where, row in source_rows(source, columns):
            anchor = stripped(row[premise], where)
            entailed, contradicting = groups.setdefault(normal_form(anchor), (where, anchor, [], []))[2:]
            value = one_label(row[label], where)
            if value is not None:
                value = names.get(value, value)
            seen_labels.add(value)
            if value == entailment:
                entailed.append(row[hypothesis])
            elif value == contradiction:
                contradicting.append(row[hypothesis])
        if missing := needed - seen_labels:
            raise ValueError(
                f"No row has {sorted(missing, key=str)} in {label!r}, which holds {sorted(seen_labels, key=str)}. "
                "Fix: name the labels of this set, such as entailment=0, contradiction=2, or another column; "
                "negatives=0 needs no contradictions."
            )
        yield from (Judged(*group) for group in groups.values())

    return contrastive_dataset(judged, negatives=negatives, seed=seed, drop_short=True, counts=counts)
