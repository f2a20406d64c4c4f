"""Batches: every row once where shares go by size, one task a step on all processes, no text twice, same order."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import ConcatDataset, DataLoader

from st_llm_embed.sampler import Source, TaskBatchSampler, apportion, hash_texts


def source(name: str, count: int, different: int | None = None, **kwargs) -> Source:
    numbers = [row % (different or count) for row in range(count)]
    columns = {"anchor": [f"{name} {row}" for row in range(count)], "positive": [f"{name} is {n}" for n in numbers]}
    return Source(name, Dataset.from_dict(columns), **kwargs)


SOURCES = [source("a", 64), source("b", 32), source("c", 8)]
STARTS = [0, 64, 96, 104]


def task_of(row: int) -> int:
    return int(np.searchsorted(STARTS, row, side="right")) - 1


@pytest.mark.parametrize("processes", [1, 2])
def test_each_row_once_and_each_step_of_one_task(processes):
    sampler = TaskBatchSampler(SOURCES, 4, processes)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 26
    assert sorted(row for batch in batches for row in batch) == list(range(104))
    steps = [sum(batches[i : i + processes], []) for i in range(0, 26, processes)]
    assert all(len({task_of(row) for row in step}) == 1 for step in steps)
    order = [task_of(step[0]) for step in steps]
    assert collections.Counter(order) == {0: 16 // processes, 1: 8 // processes, 2: 2 // processes}
    assert order != sorted(order)


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int) -> list:
        sampler = TaskBatchSampler(SOURCES, 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    different = [order(seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


def test_one_process_and_several_take_the_same_steps():
    one, two = list(TaskBatchSampler(SOURCES, 8)), list(TaskBatchSampler(SOURCES, 4, 2))
    assert [two[i] + two[i + 1] for i in range(0, len(two), 2)] == one


def test_blended_batches_draw_from_all():
    sampler = TaskBatchSampler(SOURCES, 13, blended=True)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(104))
    assert sum(len({task_of(row) for row in batch}) > 1 for batch in batches) == len(batches) == 8


def test_shares_by_temperature_and_weight():
    """Against the formula: 64, 32 and 8 rows at temperature 2 have the shares of 8, 5.66 and 2.83."""
    for blended, batch_size, units in ((False, 4, 26), (True, 4, 104)):
        sampler = TaskBatchSampler(SOURCES, batch_size, blended=blended, temperature=2)
        rows = collections.Counter(task_of(row) for batch in sampler for row in batch)
        roots = np.sqrt([64, 32, 8])
        expected = roots / roots.sum() * units
        found = np.array([rows[task] for task in range(3)]) / (1 if blended else batch_size)
        assert np.abs(found - expected).max() < 1 and found.sum() == units
    weighted = TaskBatchSampler([source("a", 40), source("b", 40, weight=3.0)], 4)
    steps = collections.Counter(batch[0] >= 40 for batch in weighted)
    assert steps == {False: 5, True: 15}
    assert apportion(np.array([0.5, 0.3, 0.2]), 7).tolist() == [4, 2, 1]


@pytest.mark.parametrize("blended", [False, True])
def test_no_text_twice_in_a_step_where_rows_are_each_others_negatives(blended):
    """Each positive is that of eight rows; without in-batch negatives nobody minds."""
    repeated = [source("a", 64, different=8), source("b", 32)]
    text = [row["positive"] for s in repeated for row in s.rows]
    sampler = TaskBatchSampler(repeated, 3, 2, blended=blended)
    batches = list(sampler)
    steps = [batches[i] + batches[i + 1] for i in range(0, len(batches), 2)]
    assert len(steps) == 16 and all(len({text[row] for row in step}) == 6 for step in steps)
    free = TaskBatchSampler([source("a", 64, different=8, distinct=False), source("b", 32)], 6, blended=blended)
    assert any(len({text[row] for row in step}) < 6 for step in free)


def test_a_negative_of_several_rows_does_no_harm():
    """But nobody's negative is another's anchor or positive."""
    names = [f"text {n}" for n in range(12)]
    rows = Dataset.from_dict(
        {
            "anchor": [f"what is {name}" for name in names],
            "positive": names,
            "negative_1": ["no"] * 12,
            "negative_2": [*names[1:], names[0]],
        }
    )
    for batch in TaskBatchSampler([Source("a", rows)], 4):
        chosen = [rows[i] for i in batch]
        assert not {row["negative_2"] for row in chosen} & {row["positive"] for row in chosen}


def test_few_rows_make_small_steps():
    (batch,) = TaskBatchSampler([SOURCES[2]], 20)
    assert sorted(batch) == list(range(8))
    halves = list(TaskBatchSampler([source("a", 9)], 20, 2))
    assert [len(half) for half in halves] == [4, 4] and len({row for half in halves for row in half}) == 8
    mixed = list(TaskBatchSampler(SOURCES, 16))
    assert {len(batch) for batch in mixed if task_of(batch[0]) == 2} <= {8} and len(mixed) == 6
    (blended,) = TaskBatchSampler(SOURCES, 200, blended=True)
    assert sorted(blended) == list(range(104))


def test_what_cannot_be_filled_is_refused():
    with pytest.raises(ValueError, match="Task 'c' has 8 rows for 9 processes, of which each takes one or more"):
        TaskBatchSampler(SOURCES, 8, 9)
    with pytest.raises(ValueError, match="Task 'a' has too few different texts for a step of 4 rows"):
        list(TaskBatchSampler([source("a", 64, different=3)], 4))


def test_under_accelerate(monkeypatch):
    """Two processes get the two halves of each step; the epoch reaches the sampler; skipping begins in the middle."""
    rows = ConcatDataset([s.rows for s in SOURCES])

    def loader(process: int) -> DataLoader:
        plain = DataLoader(rows, batch_sampler=TaskBatchSampler(SOURCES, 4, 2), collate_fn=lambda batch: batch)
        return prepare_data_loader(plain, num_processes=2, process_index=process, even_batches=False)

    expected = TaskBatchSampler(SOURCES, 4, 2)
    for epoch in (0, 1):
        expected.set_epoch(epoch)
        batches = [[rows[i] for i in batch] for batch in expected]
        for process in (0, 1):
            own = loader(process)
            own.set_epoch(epoch)
            assert len(own) == 13 and list(own) == batches[process::2]
            assert list(skip_first_batches(own, 5)) == batches[process::2][5:]


def test_spellings_of_one_text_have_one_number():
    """White space and the forms of Unicode: a positive in another spelling is no row's negative."""
    spellings = ["the café  is here", " the cafe\u0301 is\there\n", "the café is here"]
    assert len(set(hash_texts(spellings).tolist())) == 1
    assert len(set(hash_texts(["grep -i", "grep -I", "grepi"]).tolist())) == 3
