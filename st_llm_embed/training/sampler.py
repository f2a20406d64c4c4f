"""Which rows make a batch: of one task on all processes, or of all tasks blended; no text twice where it would hurt.

NV-Embed (arXiv 2405.17428) blends its tasks inside a batch; SFR, GritLM and EmbeddingGemma give each step one task. A
task's share of the rows is its ``weight`` times its size to the power 1 / temperature. What is left of a share when an
epoch has whole steps, or whole rows, goes to some epochs and not to others, so that over the epochs it comes out.

The order is a pure function of seed and epoch, so a run that is resumed in the middle of an epoch goes on as if it had
not stopped. Out: indices into the concatenation of the data sets, ``batch_size`` of them for one process; consecutive
batches belong to consecutive processes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from torch.utils.data import Sampler

from st_llm_embed.data.columns import text_columns
from st_llm_embed.losses.row_labels import number_texts

logger = logging.getLogger(__name__)
ROWS_AT_ONCE = 50_000
STEPS_SORTED = 16  # at a time, by the length of their rows
AwaitedText = tuple[int, bool]  # a text's number, and whether the rows that wait for it have it as anchor or positive
GOLDEN = (5**0.5 - 1) / 2  # its multiples, without their whole parts, spread evenly: the first few and all


@dataclass(frozen=True)
class Source:
    """A task's rows.

    Args:
        name: the task's name.
        rows: the task's data set.
        distinct: whether its rows are each other's negatives, so that no step may have an anchor or positive of one
            row in another row.
        weight: a factor on the task's share.
        by_length: whether rows of like length come together: of 16 steps' rows, the shortest make one step, and so on.
    """

    name: str
    rows: Dataset
    distinct: bool = True
    weight: float = 1.0
    by_length: bool = False


class RowOrder:
    """A task's rows in random order, again and again. Those with a text that is in the step already wait for a later
    one, where they come first.

    No row's anchor or positive is another's negative, anchor or positive. A negative of several rows does no harm.

    Args:
        rows: the number of rows.
        texts: ``(rows, columns)``, a number for each text, equal where texts are equal; None where rows are not each
            other's negatives.
        random: the generator of the order.
        lengths: ``(rows,)``, by which rows come together; None for no such order.
        together: the number of rows of a step.
    """

    def __init__(
        self,
        rows: int,
        texts: np.ndarray | None,
        random: np.random.Generator,
        lengths: np.ndarray | None = None,
        together: int = 1,
    ) -> None:
        self.lengths, self.together = lengths, together
        self.texts = texts
        self.random = random
        self.order: Iterator[int] = iter(())
        # Rows by the text that they wait for: while one waits, all wait. So a step asks once for each text, however
        # many rows share it.
        self.waiting: dict[AwaitedText, deque[int]] = {}
        self.awaited: deque[AwaitedText] = deque()
        self.is_waiting = np.zeros(rows, dtype=bool)
        self.begin_step()

    def begin_step(self) -> None:
        self.anchors_and_positives: set[int] = set()  # of the step's rows
        self.all_texts: set[int] = set()  # of the step's rows
        self.unasked = len(self.awaited)
        self.seen_all = False  # since the step began

    def next_row(self) -> int | None:
        """The next row that goes with those of the step; None where none does."""
        while self.unasked:
            row = self._next_waiting(self.awaited[0])
            if row is not None:
                return row
            self.unasked -= 1
            text = self.awaited.popleft()
            if self.waiting[text]:
                self.awaited.append(text)
            else:
                del self.waiting[text]
        while True:
            for row in self.order:
                if self._joins(row):
                    return row
            if self.seen_all:
                return None
            self.order = iter(self._by_length(self.random.permutation(np.flatnonzero(~self.is_waiting))).tolist())
            self.seen_all = self.texts is not None

    def _by_length(self, order: np.ndarray) -> np.ndarray:
        """An order in which the rows of a step are of like length, and the steps of any."""
        if self.lengths is None:
            return order
        steps: list[np.ndarray] = []
        for start in range(0, len(order), STEPS_SORTED * self.together):
            rows = order[start : start + STEPS_SORTED * self.together]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            whole = len(rows) // self.together
            steps += [rows[step * self.together :][: self.together] for step in self.random.permutation(whole)]
            steps.append(rows[whole * self.together :])  # of the last, which fill none
        return np.concatenate([order[:0], *steps])

    def _next_waiting(self, text: AwaitedText) -> int | None:
        rows = self.waiting[text]
        while rows and not self._is_in_step(text):
            row = rows.popleft()
            self.is_waiting[row] = False
            if self._joins(row):
                return row
        return None

    def _is_in_step(self, text: AwaitedText) -> bool:
        """Is it in the step where it must not be: an anchor or positive in any place, a negative as one of those?"""
        number, is_anchor_or_positive = text
        return number in (self.all_texts if is_anchor_or_positive else self.anchors_and_positives)

    def _joins(self, row: int) -> bool:
        """Put a row into the step, or let it wait."""
        if self.texts is None:
            return True
        texts = self.texts[row].tolist()
        for place, number in enumerate(texts):
            if self._is_in_step(text := (number, place < 2)):
                if text not in self.waiting:
                    self.waiting[text] = deque()
                    self.awaited.append(text)
                self.waiting[text].append(row)
                self.is_waiting[row] = True
                return False
        self.anchors_and_positives.update(texts[:2])
        self.all_texts.update(texts)
        return True


class TaskBatchSampler(Sampler[list[int]]):
    """Batches of one task each, or blended.

    Args:
        sources: the tasks' rows, in the order in which they are concatenated.
        batch_size: the number of rows in one process's batch.
        num_processes: the number of processes. So many consecutive batches make a step: of one task, if not blended,
            and with no text twice where it would hurt.
        blended: whether each batch draws from all tasks.
        temperature: the temperature of the tasks' shares: 1 for shares by size, larger for more even ones.
        seed: the seed of the order.

    A task with fewer rows than a step takes gives smaller steps, and the more of them; a step that cannot be filled
    without repeating a text is smaller too.

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
        self._lengths = [text_lengths(source.rows) if source.by_length else None for source in self.sources]
        shares = np.array([s.weight * n ** (1 / temperature) for s, n in zip(self.sources, sizes, strict=True)])
        shares *= sum(sizes) / shares.sum()  # rows of an epoch
        # The same number of rows on each process.
        available = [sum(sizes)] * len(sizes) if blended else sizes
        self._step_sizes = [min(batch_size, rows // num_processes) * num_processes for rows in available]
        for source, rows, step_size in zip(self.sources, available, self._step_sizes, strict=True):
            if not step_size:
                raise ValueError(
                    f"Task {source.name!r} has {rows} rows for {num_processes} processes, of which each takes one or "
                    "more. Give it more rows, or blend the tasks."
                )
        steps = shares / self._step_sizes
        self.steps = max(1, int(steps.sum() + 1e-9))
        self._steps_of = steps * self.steps / steps.sum()  # in an epoch; where blended, as if it were alone in them
        self._check_texts()

    def _check_texts(self) -> None:
        """Can each task fill a step, and take all of its rows in an epoch?"""
        for number, texts in enumerate(self._texts):
            if texts is None:
                continue
            source, order = self.sources[number], self._row_order(number)
            step_size = self._step_sizes[number]
            wanted = int(step_size * self._steps_of[number] / self.steps) if self.blended else step_size
            together = sum(order.next_row() is not None for _ in range(wanted))
            if together < wanted:
                raise ValueError(
                    f"Task {source.name!r} has too few different texts for a step of {wanted} rows without "
                    f"repetition: {together} rows go together. Lower the batch size, or turn its in-batch negatives "
                    f"off: Task({source.name!r}, ..., in_batch_negatives=False)."
                )
            steps = self.steps if self.blended else max(1, round(self._steps_of[number]))
            left_out = max(
                int((np.unique(column, return_counts=True)[1] - steps).clip(0).sum()) for column in texts.T[:2]
            )
            if left_out:
                logger.warning(
                    f"Task {source.name!r}: of rows with the same anchor or positive, a step takes one. An epoch has "
                    f"{steps} of its steps, which leaves out {left_out} of {len(texts)} rows and repeats others."
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
        orders = [self._row_order(number) for number in range(len(self.sources))]
        per_step = self._step_sizes[0] if self.blended else 1
        counts = apportion(self._steps_of * per_step, self.epoch)
        schedule = self._generator("order").permutation(np.repeat(np.arange(len(self.sources)), counts))
        for begin in range(0, len(schedule), per_step):
            wanted = schedule[begin : begin + per_step]
            if not self.blended:
                wanted = np.repeat(wanted, self._step_sizes[wanted[0]])
            step: list[int] = []
            while len(step) < self.num_processes:  # a row that goes with no other may have come first
                for order in orders:
                    order.begin_step()
                rows = ((number, orders[number].next_row()) for number in wanted.tolist())
                step = [int(self._starts[number]) + row for number, row in rows if row is not None]
            size = len(step) // self.num_processes
            for process in range(self.num_processes):
                yield step[process * size : (process + 1) * size]

    def _generator(self, purpose: str) -> np.random.Generator:
        digest = blake2b(f"{self.seed}\n{self.epoch}\n{purpose}".encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))

    def _row_order(self, number: int) -> RowOrder:
        source = self.sources[number]
        random = self._generator(f"rows of {source.name}")
        return RowOrder(len(source.rows), self._texts[number], random, self._lengths[number], self._step_sizes[number])


def apportion(exact: np.ndarray, epoch: int) -> np.ndarray:
    """Whole numbers with the sum of ``exact``, each rounded down or up, so that over the epochs they come out.

    The fractions stand one after the other on a line, which is marked at distances of 1; whose fraction has a mark is
    rounded up. From epoch to epoch the marks move on.
    """
    exact = np.round(exact, 9)  # sums of shares are not quite whole
    whole = np.floor(exact)
    ends = np.round(np.cumsum(exact - whole), 9)
    marks = np.ceil(ends - (0.5 + epoch * GOLDEN) % 1)
    return (whole + np.diff(marks, prepend=0)).astype(int)


def text_lengths(rows: Dataset) -> np.ndarray:
    """``(rows,)``: the number of characters of each row's texts."""
    columns = text_columns(rows.column_names)
    parts = [
        sum(pc.utf8_length(batch[column]).to_numpy() for column in columns)
        for batch in rows.with_format("arrow").iter(ROWS_AT_ONCE)
    ]
    return np.concatenate(parts)


def text_numbers(rows: Dataset) -> np.ndarray:
    """``(rows, columns)``: a number for each text, equal where texts are equal (hashes of 63 bits)."""
    columns = text_columns(rows.column_names)
    parts = [
        np.stack([number_texts(batch[column].to_pylist()) for column in columns], axis=1)
        for batch in rows.with_format("arrow").iter(ROWS_AT_ONCE)
    ]
    return np.concatenate(parts)
