"""An LLM's sliding windows and chunks: opened, or narrowed for a probe.

They stand in its configuration, and in the layers that copied them from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

WINDOWS = ("sliding_window", "attention_chunk_size")
WIDE = 2**30  # tokens: an open window, where None is not an option. Small enough for the int32 of attention kernels


def _windows(model: PreTrainedModel) -> list[tuple[Any, str, int]]:
    """Every ``(owner, attribute, size)`` of a window: the config's, and those that layers copied from it."""
    config = model.config.get_text_config()
    names = [name for name in WINDOWS if getattr(config, name, None)]
    owners = [config, *(model.modules() if names else ())]
    sizes = [(owner, name, vars(owner).get(name)) for owner in owners for name in names]
    return [(owner, name, size) for owner, name, size in sizes if isinstance(size, int) and size > 0]


def open_windows(model: PreTrainedModel) -> None:
    # NOTE: where each layer has its type, None does not turn the windows off, and models fail over it.
    typed = getattr(model.config.get_text_config(), "layer_types", None)
    for owner, name, _ in _windows(model):
        setattr(owner, name, WIDE if typed or name != "sliding_window" else None)


@contextmanager
def narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Kept windows are 2 tokens wide for the duration of a probe, so that its few tokens show them."""
    kept = [window for window in _windows(model) if window[2] != WIDE]
    for owner, name, _ in kept:
        setattr(owner, name, 2)
    try:
        yield
    finally:
        for owner, name, size in kept:
            setattr(owner, name, size)
