"""Turn a GGUF file into an ordinary model folder, which every other loader then reads.

transformers reads GGUF weights, but refuses to save the model while its quantisation config is attached; the model is
rebuilt from its config and its de-quantised float32 weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from st_llm_embed.modules.first_layers import check_depth, keep_first_layers


def unpack_gguf(file: Path, folder: Path, num_layers: int | None = None) -> None:
    """Write the model and tokenizer of a GGUF file to ``folder`` as float32 safetensors.

    Args:
        file: a ``.gguf`` file of an architecture that transformers can read.
        folder: the folder to write.
        num_layers: how many of the LLM's first layers to keep; None for all.

    Raises:
        FileNotFoundError: if ``file`` does not exist.
        ImportError: if the ``gguf`` package is missing.
        ValueError: if ``num_layers`` is outside 1..depth.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no GGUF file at {file}.")
    with _parsed_once():
        if num_layers is not None:
            check_depth(AutoConfig.from_pretrained(file.parent, gguf_file=file.name), num_layers)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del quantised.config.quantization_config
    quantised.config._name_or_path = file.stem
    if num_layers is not None:
        keep_first_layers(quantised, num_layers)
    with torch.device("meta"):  # the weights are assigned below: no need to draw random ones first
        model = type(quantised)(quantised.config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """One reader of a file for all who ask.

    NOTE: transformers 5.23 reads a file's vocabulary, word by word in Python, for the configuration, the tokenizer and
    the model, which takes most of the time.
    """
    try:
        import gguf
    except ImportError:  # which the loaders explain
        yield
        return
    reader = gguf.GGUFReader
    vars(gguf)["GGUFReader"] = cache(reader)
    try:
        yield
    finally:
        vars(gguf)["GGUFReader"] = reader
