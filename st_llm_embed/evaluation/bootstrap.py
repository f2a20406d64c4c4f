"""By how much a model scores higher than another on the same queries, with an interval: a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 10_000
LARGEST_BLOCK = 1 << 23  # queries drawn at once: 64 MB of their numbers


def paired_interval(differences: Sequence[np.ndarray], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The interval of a mean difference, by the quantiles of the means of ``DRAWS`` samples of the queries.

    Args:
        differences: the difference of each query's two scores, an array ``(queries,)`` for each subset of the task.
            Each is sampled by itself, and the mean is that of the subsets' means, as it is in mteb's scores.
        level: the share of samples inside.
        seed: the seed of the samples.
    """
    random = np.random.default_rng(seed)
    means = np.mean([_means(own, random) for own in differences], axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _means(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The means ``(DRAWS,)`` of samples of values, each as large as they are, with replacement."""
    block = max(1, LARGEST_BLOCK // len(values))
    sizes = [min(block, DRAWS - start) for start in range(0, DRAWS, block)]
    return np.concatenate(
        [values[random.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes]
    )
