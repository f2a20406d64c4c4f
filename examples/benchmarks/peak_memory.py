"""How many bytes the tensors made inside a block of code hold at most, on any device, forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Most bytes that tensors made inside were holding at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := leaf.untyped_storage()._cdata) not in self.known:
                storage, size = leaf.untyped_storage(), leaf.untyped_storage().nbytes()
                if not any(isinstance(a, Tensor) and a.untyped_storage()._cdata == key for a in tree_leaves(args)):
                    self.known.add(key)
                    self.alive += size
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self.free, key, size)
        return result

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size
