"""Which rows make a batch: of one task on all processes, or of all tasks blended; no text twice where it would hurt.

NV-Embed (arXiv 2405.17428) blends its tasks inside a batch; SFR, GritLM and EmbeddingGemma give each step one task. A
task's share of the steps, or of the rows, is its ``weight`` times its size to the power 1 / temperature.

The order is a pure function of seed and epoch, so a run that is resumed in the middle of an epoch goes on as if it had
not stopped. Out: indices into the concatenation of the data sets, ``batch_size`` of them for one process; consecutive
batches belong to consecutive processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pandas as pd
from datasets import Dataset
from torch.utils.data import Sampler

from st_llm_embed.data.columns import text_columns
from st_llm_embed.data.normal_form import normal_form

ROWS_AT_ONCE = 50_000
LOOK_AHEAD = 1000  # rows put off because a text of theirs is in the batch


@dataclass(frozen=True)
class Source:
    """A task's rows.

    Args:
        name: the task's name.
        rows: its data set.
        distinct: whether its rows are each other's negatives, so that what is right for one may not be in another.
        weight: a factor on its share.
    """

    name: str
    rows: Dataset
    distinct: bool = True
    weight: float = 1.0


@dataclass
class Seen:
    """The texts of a step so far: what is right for some row, and all. A negative of several rows does no harm."""

    right: set[int]
    every: set[int]

    def goes_with(self, texts: np.ndarray) -> bool:
        """Is no row's anchor or positive another's negative, anchor or positive?"""
        right, wrong = texts[:2].tolist(), texts[2:].tolist()
        return self.every.isdisjoint(right) and self.right.isdisjoint(wrong)

    def add(self, texts: np.ndarray) -> None:
        self.right.update(texts[:2].tolist())
        self.every.update(texts.tolist())


class TaskBatchSampler(Sampler[list[int]]):
    """Batches of one task each, or blended.

    Args:
        sources: the tasks' rows, in the order in which they are concatenated.
        batch_size: rows of a batch of one process.
        num_processes: so many consecutive batches make a step: of one task, if not blended, and as one batch.
        blended: whether each batch draws from all tasks.
        temperature: 1 for shares by size, larger for more even ones.
        seed: of the order.

    A task with fewer rows than a step takes gives smaller steps.

    Raises:
        ValueError: for fewer rows than processes, or a task whose rows repeat so many texts that no step is filled.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        batch_size: int,
        num_processes: int = 1,
        blended: bool = False,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.sources = list(sources)
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.blended = blended
        self.seed = seed
        self.epoch = 0
        self.drop_last = True
        sizes = [len(source.rows) for source in self.sources]
        self._starts = np.cumsum([0, *sizes])
        self._texts = [text_numbers(source.rows) if source.distinct else None for source in self.sources]
        shares = np.array([s.weight * n ** (1 / temperature) for s, n in zip(self.sources, sizes, strict=True)])
        self._shares = shares / shares.sum()
        self.steps = max(1, sum(sizes) // (batch_size * num_processes))
        # The same number of rows on each process.
        available = [sum(sizes)] * len(sizes) if blended else sizes
        self._step_sizes = [min(batch_size, rows // num_processes) * num_processes for rows in available]
        for source, rows, step_size in zip(self.sources, available, self._step_sizes, strict=True):
            if not step_size:
                raise ValueError(
                    f"Task {source.name!r} has {rows} rows for {num_processes} processes, of which each takes one or "
                    "more. Give it more rows, or blend the tasks."
                )

    @property
    def sampler(self) -> TaskBatchSampler:
        """NOTE: with several processes accelerate wraps this object, and tells the epoch only to its ``sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        streams = [self._stream(number) for number in range(len(self.sources))]
        put_off: list[deque[int]] = [deque() for _ in self.sources]
        order = self._generator("order")
        per_step = self._step_sizes[0] if self.blended else 1
        counts = apportion(self._shares, self.steps * per_step)
        schedule = order.permutation(np.repeat(np.arange(len(self.sources)), counts))
        for begin in range(0, len(schedule), per_step):
            wanted = schedule[begin : begin + per_step]
            if not self.blended:
                wanted = np.repeat(wanted, self._step_sizes[wanted[0]])
            seen = [Seen(set(), set()) for _ in self.sources]
            step = [self._next_row(number, streams[number], put_off[number], seen[number]) for number in wanted]
            size = len(step) // self.num_processes
            for start in range(0, len(step), size):
                yield step[start : start + size]

    def _generator(self, purpose: str) -> np.random.Generator:
        digest = blake2b(f"{self.seed}\n{self.epoch}\n{purpose}".encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))

    def _stream(self, number: int) -> Iterator[int]:
        """A task's rows in random order, again and again."""
        random = self._generator(f"rows of {self.sources[number].name}")
        while True:
            yield from random.permutation(len(self.sources[number].rows)).tolist()

    def _next_row(self, number: int, stream: Iterator[int], put_off: deque[int], seen: Seen) -> int:
        """The next row that goes with those of the step, as an index into the concatenation."""
        texts = self._texts[number]
        if texts is None:
            return int(self._starts[number]) + next(stream)
        for _ in range(len(put_off)):  # those put off before come first
            row = put_off.popleft()
            if seen.goes_with(texts[row]):
                break
            put_off.append(row)
        else:
            while not seen.goes_with(texts[row := next(stream)]):
                put_off.append(row)
                if len(put_off) > max(LOOK_AHEAD, len(texts)):
                    name = self.sources[number].name
                    raise ValueError(
                        f"Task {name!r} has too few different texts for a step of {self._step_sizes[number]} rows "
                        "without repetition. Lower the batch size, or turn its in-batch negatives off: "
                        f"Task({name!r}, ..., in_batch_negatives=False)."
                    )
        seen.add(texts[row])
        return int(self._starts[number]) + row


def apportion(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that add up to ``total``, nearest to the shares (the largest remainders are rounded up)."""
    exact = shares * total
    counts = np.floor(exact).astype(int)
    for number in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[number] += 1
    return counts


def text_numbers(rows: Dataset) -> np.ndarray:
    """``(rows, columns)``: a number for each text, equal where texts are equal (hashes of 63 bits)."""
    columns = text_columns(rows.column_names)
    parts = [
        np.stack([hash_texts(batch[column].to_pylist()) for column in columns], axis=1)
        for batch in rows.with_format("arrow").iter(ROWS_AT_ONCE)
    ]
    return np.concatenate(parts)


def hash_texts(texts: Sequence[str]) -> np.ndarray:
    """``(texts,)``, not negative, the same in every process and for every spelling of a text."""
    forms = np.array([normal_form(text) for text in texts], dtype=object)
    return (pd.util.hash_array(forms, categorize=False) >> np.uint64(1)).astype(np.int64)
