"""Does a model give the same embeddings however it is run: padded or not, by another attention or precision?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from mteb.abstasks import AbsTask
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from st_llm_embed.evaluation.encoder import PromptedEncoder
from st_llm_embed.evaluation.evaluate import attention_of, find_model, find_tasks, load_model
from st_llm_embed.trust import model_class

TEXTS_OF_A_TASK = 32
TEXT_COLUMNS = ("text", "sentences", "sentence1", "sentence2")  # of mteb's tasks


class Parity(NamedTuple):
    """How two ways to run a model differ.

    Args:
        ways: the two ways that are compared.
        difference: the largest difference of a component of an embedding.
        cosine: the lowest cosine between a text's two embeddings.
        neighbours: the share of texts, from 0 to 1, whose nearest other text is the same.
    """

    ways: str
    difference: float
    cosine: float
    neighbours: float


def parity(
    source: str | Path,
    tasks: Sequence[str | Path],
    *,
    split: str = "test",
    batch_size: int = 32,
    max_seq_length: int | None = None,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[Parity]:
    """Compare the ways to run a model on texts of tasks: padded and one at a time, eager attention and SDPA (and flash
    attention on a GPU, in bfloat16), float32 and bfloat16.

    Args:
        source, tasks, split, batch_size, max_seq_length, device, revision, trust_remote_code: see ``evaluate``.

    Raises:
        ValueError: as ``evaluate`` does.
    """
    root, commit = find_model(source, revision)
    if (kind := model_class(root)) is not SentenceTransformer:
        raise ValueError(f"parity compares models of one dense vector for a text, and {source} is a {kind.__name__}.")

    def load(dtype: str, attention: str) -> SentenceTransformer:
        return load_model(root, dtype, attention, max_seq_length, device, trust_remote_code)

    model = load("float32", "sdpa")
    encoder = PromptedEncoder(model, str(source), commit)
    texts: dict[str, list[str]] = {}
    for task in find_tasks(tasks, split):
        texts.setdefault(encoder.main_prompt(task), []).extend(_texts(task))

    def vectors(model: SentenceTransformer, size: int = batch_size) -> Tensor:
        parts = [model.encode(prompted, prompt=prompt, batch_size=size) for prompt, prompted in texts.items()]
        return torch.cat([torch.as_tensor(part).double() for part in parts])

    padded = vectors(model)
    comparisons = [_compare("padded, one at a time", padded, vectors(model, size=1))]
    eager = load("float32", "eager")
    if attention_of(eager) == "eager":
        comparisons.append(_compare("SDPA, eager", padded, vectors(eager)))
    half = vectors(load("bfloat16", "sdpa"))
    comparisons.append(_compare("float32, bfloat16", padded, half))
    if model.device.type == "cuda" and is_flash_attn_2_available():
        flash = vectors(load("bfloat16", "flash_attention_2"))
        comparisons.append(_compare("SDPA, flash attention 2 (bfloat16)", half, flash))
    return comparisons


def as_markdown(comparisons: Sequence[Parity]) -> str:
    """A table of the comparisons."""
    lines = [
        "| compared | largest difference | lowest cosine | same nearest text |",
        "| --- | --- | --- | --- |",
        *(f"| {row.ways} | {row.difference:.1e} | {row.cosine:.6f} | {row.neighbours:.1%} |" for row in comparisons),
    ]
    return "\n".join(lines) + "\n"


def _compare(ways: str, first: Tensor, second: Tensor) -> Parity:
    cosine = torch.cosine_similarity(first, second).min().item()
    same = (_nearest(first) == _nearest(second)).double().mean().item()
    return Parity(ways, (first - second).abs().max().item(), cosine, same)


def _nearest(vectors: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(vectors)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).argmax(dim=1)


def _texts(task: AbsTask) -> list[str]:
    """A few texts of a task."""
    task.load_data()
    texts = dict.fromkeys(text for text in _walk(task.dataset) if text.strip())
    task.unload_data()
    return list(texts)[:TEXTS_OF_A_TASK]


def _walk(data: object) -> Iterator[str]:
    """The texts of data sets in dictionaries, as mteb nests them by subset, split and part."""
    if isinstance(data, Dataset):
        for row in data.select(range(min(len(data), TEXTS_OF_A_TASK))):
            yield from (row[column] for column in TEXT_COLUMNS if isinstance(row.get(column), str))
    elif isinstance(data, dict):
        for part in data.values():
            yield from _walk(part)
