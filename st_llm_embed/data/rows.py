"""Clean rows of ``anchor, positive, negative_1..n`` from judged texts: what all builders end with.

Removed and counted: empty texts, a positive that is its anchor, a negative that is its anchor or one of its positives
(a contradiction), and a row that was there before. Texts are the same if their normal forms are. Which negatives a row
gets depends on the seed and its own texts alone, so a stream gives the rows that the whole data set gives.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets

from .normal_form import normal_form
from .sources import stripped

logger = logging.getLogger(__name__)
ROWS_AT_ONCE = 10_000


class Judged(NamedTuple):
    """One anchor and the texts judged for it."""

    where: str  # how an error names it: "Row 3", "Line 4 of train.jsonl"
    anchor: str | None  # None is an empty text, here and below
    positives: Iterable[str | None]
    negatives: Iterable[str | None] = ()


def contrastive_dataset(
    judged: Callable[[Counter[str]], Iterable[Judged]],
    *,
    negatives: int,
    seed: int = 0,
    drop_short: bool = False,
    streaming: bool = False,
    counts: Counter[str] | None = None,
) -> Dataset | IterableDataset:
    """One row for each positive, with ``negatives`` of its anchor's negatives, in the source's order.

    Args:
        judged: a function that gives the judged texts from the start each time it is called; it may count in its
            argument.
        negatives: how many of the judged negatives each row gets as hard negatives.
        seed: the seed of the choice of hard negatives.
        drop_short: whether to drop rows with fewer negatives, and count them, instead of raising.
        streaming: whether to make the rows as they are read. Of a stream's rows, hashes of 16 bytes are held (for
            duplicates).
        counts: a counter, emptied and then filled: anchors ``read``, ``rows`` made, and what was removed: ``empty``
            texts, ``duplicates`` (rows, and texts of one anchor), ``contradictions``, positives ``identical`` to their
            anchor, anchors with ``no positive``, rows with ``too few negatives``. For a stream, as its rows pass, in
            the process that reads them.

    Raises:
        ValueError: for a row with fewer negatives, a value that is not text, or no rows at all; of a stream, when it
            is read.
    """
    if negatives < 0:
        raise ValueError(f"negatives={negatives} must be 0 or more.")
    counted: Counter[str] = Counter() if counts is None else counts
    columns = ["anchor", "positive", *(f"negative_{i + 1}" for i in range(negatives))]

    def rows() -> Iterator[dict[str, str]]:
        counted.clear()
        for row in _clean(judged(counted), negatives, seed, drop_short, counted):
            yield dict(zip(columns, row, strict=True))
        if not counted["rows"]:
            raise ValueError(f"No row is left of what was read: {dict(+counted) or 'the source is empty'}.")
        removed = [f"{count:,} {name}" for name, count in counted.items() if count and name not in ("read", "rows")]
        if removed:
            logger.warning(
                f"{counted['rows']:,} rows were made of {counted['read']:,} anchors. Left out: {', '.join(removed)}."
            )

    features = Features({column: Value("string") for column in columns})
    if streaming:
        return IterableDataset.from_generator(rows, features=features)
    # Not Dataset.from_generator: its cache knows the generator, not the files, and would give their old rows again.
    made = rows()
    batches = iter(lambda: list(islice(made, ROWS_AT_ONCE)), [])
    return concatenate_datasets([Dataset.from_list(batch, features=features) for batch in batches])


def _clean(
    judged: Iterable[Judged], count: int, seed: int, drop_short: bool, counts: Counter[str]
) -> Iterator[tuple[str, ...]]:
    seen = set()
    for entry in judged:
        counts["read"] += 1
        anchors = _distinct([entry.anchor], entry.where, counts)
        positives = _distinct(entry.positives, entry.where, counts)
        negatives = _distinct(entry.negatives, entry.where, counts) if count else {}
        for form, anchor in anchors.items():
            counts["contradictions"] += len(negatives.keys() & (positives.keys() | {form}))
            usable = [(key, text) for key, text in negatives.items() if key not in positives and key != form]
            counts["identical"] += form in positives
            distinct_positives = {key: text for key, text in positives.items() if key != form}
            counts["no positive"] += not distinct_positives
            for positive_form, positive in distinct_positives.items():
                if len(usable) < count:
                    if not drop_short:
                        raise ValueError(_short(entry.where, anchor, len(usable), count))
                    counts["too few negatives"] += 1
                    continue
                drawn = random.Random(f"{seed}\n{anchor}\n{positive}").sample(range(len(usable)), count)
                chosen = [usable[i] for i in sorted(drawn)]
                forms = (form, positive_form, *(key for key, _ in chosen))
                digest = blake2b("\0".join(forms).encode(), digest_size=16).digest()
                if digest in seen:
                    counts["duplicates"] += 1
                    continue
                seen.add(digest)
                counts["rows"] += 1
                yield anchor, positive, *(text for _, text in chosen)


def _distinct(texts: Iterable[Any], where: str, counts: Counter[str]) -> dict[str, str]:
    """``texts`` without the space around them, by their normal forms: in order, each once, none empty."""
    kept: dict[str, str] = {}
    for text in texts:
        clean = stripped(text, where)
        form = normal_form(clean)
        if not form:
            counts["empty"] += 1
        elif form in kept:
            counts["duplicates"] += 1
        else:
            kept[form] = clean
    return kept


def _short(where: str, anchor: str, available: int, count: int) -> str:
    return (
        f"{where} ({anchor[:60]!r}) has {available} negatives, and negatives={count} asks for {count}. Every row "
        f"needs the same number. Fix: ask for fewer, mine more, or drop and count such rows with drop_short=True."
    )
