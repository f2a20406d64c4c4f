"""Ridge regression in one pass: the linear map that turns one kind of vectors into another, in closed form.

    W, b = argmin  Σ |y - W x - b|²  +  λ |W|²        W = (X'X + λ)⁻¹ X'Y of the centred X and Y

What is kept of the rows are their means and products, in float64: a matrix of the width of x, whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np


class RidgeRegression:
    """The sums of a ridge regression.

    Args:
        in_features: the width of x.
        out_features: the width of y.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        self.rows = 0
        self._mean_x, self._mean_y = np.zeros(in_features), np.zeros(out_features)
        self._xx, self._xy = np.zeros((in_features, in_features)), np.zeros((in_features, out_features))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Take rows.

        Args:
            x: ``(rows, in_features)``.
            y: ``(rows, out_features)``.

        Raises:
            ValueError: for arrays of another shape, or with what is no number.
        """
        wide = (len(self._mean_x), len(self._mean_y))
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or (x.shape[1], y.shape[1]) != wide:
            raise ValueError(f"x {x.shape} and y {y.shape} must be (rows, {wide[0]}) and (rows, {wide[1]}).")
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError("x and y must be finite numbers.")
        if not len(x):
            return
        x, y = x.astype(np.float64), y.astype(np.float64)
        mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
        # Centred by the rows' own means, and moved to the common ones (Chan et al. 1979): an LLM has dimensions whose
        # mean is a hundred times their deviation, of which the products of what is not centred would keep nothing.
        share = self.rows * len(x) / (self.rows + len(x))
        step_x, step_y = mean_x - self._mean_x, mean_y - self._mean_y
        self._xx += (x - mean_x).T @ (x - mean_x) + share * np.outer(step_x, step_x)
        self._xy += (x - mean_x).T @ (y - mean_y) + share * np.outer(step_x, step_y)
        self.rows += len(x)
        self._mean_x += step_x * len(x) / self.rows
        self._mean_y += step_y * len(x) / self.rows

    def solve(self, penalties: Iterable[float]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The map for each penalty.

        Args:
            penalties: λ in units of the mean variance of a dimension of x, times the rows.

        Returns:
            W ``(out_features, in_features)`` and b ``(out_features,)``.

        Raises:
            ValueError: for fewer than two rows, or a penalty that is not positive.
        """
        if self.rows < 2:
            raise ValueError(f"The map needs two rows or more, and there are {self.rows}.")
        values, vectors = np.linalg.eigh(self._xx)
        products, unit = vectors.T @ self._xy, max(np.trace(self._xx) / len(values), np.finfo(float).tiny)
        for penalty in penalties:
            if not penalty > 0:
                raise ValueError(f"The penalty {penalty} must be positive.")
            weight = (vectors @ (products / (values.clip(min=0) + penalty * unit)[:, None])).T
            yield weight, self._mean_y - weight @ self._mean_x
