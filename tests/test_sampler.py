"""Batches: every row once where shares go by size, one task a step on all processes, no text twice, same order."""

from __future__ import annotations

import collections
import time

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import ConcatDataset, DataLoader

from st_llm_embed.losses.row_labels import number_texts
from st_llm_embed.training.sampler import Source, TaskBatchSampler, apportion


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


def test_what_is_left_of_a_share_goes_to_other_epochs():
    """Against the exact shares: within one step in each epoch, within three after hundreds."""
    random = np.random.default_rng(0)
    for count in (2, 5, 40):
        shares = random.pareto(0.5, count) + 1e-3
        exact = shares / shares.sum() * 30
        total = np.zeros(count)
        for epoch in range(300):
            counts = apportion(exact, epoch)
            assert counts.sum() == 30 and np.abs(counts - exact).max() < 1
            total += counts
            assert np.abs(total - exact * (epoch + 1)).max() < 3
    assert apportion(np.array([3.0, 2.0]), 7).tolist() == [3, 2]


@pytest.mark.parametrize(
    ("sizes", "batch_size"),
    [((10_000, 15), 64), ((1000, 20, 20, 20), 64), ((40, 40, 40), 64), ((10, 10), 32), ((900, 100, 7), 30)],
)
@pytest.mark.parametrize("blended", [False, True])
def test_sets_smaller_than_a_batch_have_their_share(sizes, batch_size, blended):
    """Of ten epochs, each set's rows are seen about ten times: within a step of its own more or less."""
    sources = [source(f"set {number}", size) for number, size in enumerate(sizes)]
    ends = np.cumsum(sizes)
    sampler = TaskBatchSampler(sources, batch_size, blended=blended)
    seen = collections.Counter()
    for epoch in range(10):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        seen.update(int(np.searchsorted(ends, row, side="right")) for batch in batches for row in batch)
    lost = 1 - sum(seen.values()) / (10 * sum(sizes))  # what makes no whole step is left out of each epoch
    assert lost < 1 / len(sampler)
    for number, size in enumerate(sizes):
        assert abs(seen[number] - 10 * size * (1 - lost)) <= 2 * min(size, batch_size)


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
    mixed = list(TaskBatchSampler(SOURCES, 16))  # 4 steps, 2 steps, and one of 8 rows
    assert [len(batch) for batch in mixed if task_of(batch[0]) == 2] == [8] and len(mixed) == 7
    assert sorted(row for batch in mixed for row in batch) == list(range(104))
    (blended,) = TaskBatchSampler(SOURCES, 200, blended=True)
    assert sorted(blended) == list(range(104))


def test_what_cannot_be_filled_is_refused():
    with pytest.raises(ValueError, match="Task 'c' has 8 rows for 9 processes, of which each takes one or more"):
        TaskBatchSampler(SOURCES, 8, 9)
    with pytest.raises(ValueError, match="Task 'a' has too few different texts for a step of 4 rows"):
        TaskBatchSampler([source("a", 64, different=3)], 4)
    # Many different anchors and positives, of which two rows at most go together.
    crossed = {"anchor": ["a"] * 20 + [f"a {n}" for n in range(20)]}
    crossed["positive"] = [f"p {n}" for n in range(20)] + ["p"] * 20
    with pytest.raises(ValueError, match="for a step of 4 rows without repetition: 2 rows go together"):
        TaskBatchSampler([Source("a", Dataset.from_dict(crossed))], 4)


def shared_positive(shared: int, others: int) -> Source:
    """A catalogue in which most questions have one answer."""
    positives = ["Call us."] * shared + [f"answer {n}" for n in range(others)]
    anchors = [f"question {n}" for n in range(shared + others)]
    return Source("faq", Dataset.from_dict({"anchor": anchors, "positive": positives}))


@pytest.mark.parametrize(("shared", "others", "batch_size"), [(1500, 500, 64), (1200, 800, 32), (60, 8, 4), (9, 1, 2)])
def test_a_positive_of_many_rows_is_in_every_step_once(shared, others, batch_size, caplog):
    """The epoch keeps its length; the other rows come equally often, and another epoch has others of the many."""
    sampler = TaskBatchSampler([shared_positive(shared, others)], batch_size)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        steps = list(sampler)
        assert len(steps) == len(sampler) == (shared + others) // batch_size
        rows = collections.Counter(row for step in steps for row in step)
        assert all(len(set(step)) == batch_size and sum(row < shared for row in step) == 1 for step in steps)
        of_others = [rows[row] for row in range(shared, shared + others)]
        assert max(of_others) - min(of_others) <= 2
        epochs.append({row for row in rows if row < shared})
        assert len(epochs[-1]) == len(steps)
    assert epochs[0] != epochs[1]
    left_out = shared - len(sampler)
    assert f"which leaves out {left_out} of {shared + others} rows" in caplog.text


def test_rows_that_share_texts_in_every_way_against_the_naive_rule():
    """Few anchors, positives and negatives, drawn at random: no step has a text twice where it would hurt, and in the
    long run all rows are drawn."""
    random = np.random.default_rng(0)
    columns = {name: [f"text {n}" for n in random.integers(0, 40, 300)] for name in ("anchor", "positive")}
    columns["negative_1"] = [f"text {n}" for n in random.integers(20, 80, 300)]
    rows = Dataset.from_dict(columns)
    texts = rows.to_list()
    seen = collections.Counter()
    sampler = TaskBatchSampler([Source("a", rows)], 3, 2)
    for epoch in range(12):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert batches == list(sampler) and len(batches) == len(sampler) == 100
        for first, second in zip(batches[::2], batches[1::2], strict=True):
            step = [texts[row] for row in first + second]
            assert len(first) == len(second) >= 1
            for i, one in enumerate(step):
                for other in step[:i]:
                    right, wrong = {other["anchor"], other["positive"]}, {other["negative_1"]}
                    assert not {one["anchor"], one["positive"]} & (right | wrong) and one["negative_1"] not in right
            seen.update(first + second)
    assert len(seen) > 290 and max(seen.values()) <= 4 * 12


def test_sampling_is_linear_in_the_rows_that_wait():
    """40,000 rows of which half share a positive, 5,000 steps of 8: before, each step asked all that were put off."""
    sampler = TaskBatchSampler([shared_positive(20_000, 20_000)], 8)
    start = time.process_time()
    assert sum(map(len, sampler)) == 40_000
    assert time.process_time() - start < 5


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
    assert len(set(number_texts(spellings).tolist())) == 1
    assert len(set(number_texts(["grep -i", "grep -I", "grepi"]).tolist())) == 3


def test_rows_of_like_length_make_a_step():
    """Each row once, in another order in each epoch; within sixteen steps, one's rows are no longer than another's."""
    texts = [f"{i} " + "word " * (i * 37 % 101) for i in range(400)]
    source = Source("read", Dataset.from_dict({"text": texts}), distinct=False, by_length=True)
    sampler, orders = TaskBatchSampler([source], 8), []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        steps = list(sampler)
        orders.append(steps)
        assert sorted(row for step in steps for row in step) == list(range(400))
        lengths = [[len(texts[row]) for row in step] for step in steps]
        for start in range(0, 50, 16):
            spans = sorted((min(step), max(step)) for step in lengths[start : start + 16])
            assert all(left[1] <= right[0] for left, right in zip(spans, spans[1:], strict=False))
        assert [max(step) for step in lengths] != sorted(max(step) for step in lengths)
    assert orders[0] != orders[1]
