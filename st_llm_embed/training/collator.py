"""Rows of one task or of several to a batch: each row under its own task's prompts, and what the loss must know of it.

Out, for ``anchor``, ``positive``, ``negative_1..n``: ``{column}_input_ids`` and so on, ``(batch, seq)``; ``label``
``(batch, 2 + columns)``, packed as ``RowLabels`` says. A row with fewer negatives than another, or of a single text
among pairs, has empty texts in their place, which the loss leaves out. Where all rows are single texts, these are the
one column. Of a teacher, ``{column}_teacher_embedding`` ``(batch, dim)``; of scores, ``{first column}_soft_labels``
``(batch, documents)``, NaN where there are none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from st_llm_embed.data.columns import DOCUMENTS, SCORES, text_columns
from st_llm_embed.losses import distillation
from st_llm_embed.losses.row_labels import NONE, RowLabels, number_texts
from st_llm_embed.teaching.embeddings import TeacherEmbeddings


@dataclass
class TaskCollator(SentenceTransformerDataCollator):
    """The host's collator for batches in which each row has a task.

    Args:
        groups: each task's group, in which rows are each other's negatives; NONE for own negatives only.
        num_negatives: how many columns of negatives each batch has at least, so that all processes agree. A batch
            whose rows have more, such as one of another data set in evaluation, has theirs.
        pairs: whether each batch has columns of pairs, even one of single texts, so that all processes agree.
        teacher: the teacher's vectors by column, of each source of rows that ``teacher_source`` and ``teacher_row``
            name.
        tokenizer: the tokenizer by which rows of different prompts are padded to one batch.

    Raises:
        ValueError: without a tokenizer, once a batch has rows of different prompts.
    """

    groups: Mapping[str, int] = field(default_factory=dict)
    num_negatives: int = 0
    pairs: bool = False
    teacher: Sequence[Mapping[str, TeacherEmbeddings]] = ()
    tokenizer: PreTrainedTokenizerBase | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        tasks = [row["dataset_name"] for row in rows]
        placed, columns = self._places([text_columns(row) for row in rows])
        batch: dict[str, Any] = {"dataset_name": ", ".join(dict.fromkeys(tasks))}
        numbers = []  # of each column's texts
        for column, names in zip(columns, placed, strict=True):
            texts = [row[name] if name else "" for row, name in zip(rows, names, strict=True)]
            numbers.append([n if name else NONE for n, name in zip(number_texts(texts).tolist(), names, strict=True)])
            for key, value in self._preprocess(texts, tasks, names).items():
                batch[f"{column}_{key}"] = value
            if self.teacher:
                batch[f"{column}_{distillation.TEACHER_EMBEDDING}"] = self._look_up(rows, names)
        if any(SCORES in row for row in rows) and len(columns) > 1:
            labels = np.full((len(rows), len(columns) - 1), np.nan, np.float32)
            for place, row in enumerate(rows):
                scores = row.get(SCORES, [])
                labels[place, : len(scores)] = scores
            batch[f"{columns[0]}_{distillation.SOFT_LABELS}"] = torch.from_numpy(labels)
        groups = torch.tensor([self.groups[task] for task in tasks])
        classes = torch.tensor([row.get("label", NONE) for row in rows])
        # Contiguous: gathering columns of a matrix across processes would mix them up without a word.
        batch["label"] = RowLabels(groups, classes, torch.tensor(numbers).T).pack().contiguous()
        return batch

    def _places(self, of_rows: list[list[str]]) -> tuple[list[list[str | None]], list[str]]:
        """By column of the batch, what each row calls the text in its place, None if it has none; and the columns."""
        if not self.pairs and all(len(columns) == 1 for columns in of_rows):
            return [[columns[0] for columns in of_rows]], ["anchor"]
        negatives = max(self.num_negatives, *(len(columns) - 2 for columns in of_rows))
        columns = ["anchor", "positive", *(f"negative_{i + 1}" for i in range(negatives))]
        placed: list[list[str | None]] = [[] for _ in columns]
        for row in of_rows:
            first = 1 if row == DOCUMENTS else 0  # a document takes the positive's place
            for place, names in enumerate(placed):
                names.append(row[place - first] if first <= place < first + len(row) else None)
        return placed, columns

    def _look_up(self, rows: list[dict[str, Any]], names: list[str | None]) -> Tensor:
        """The teacher's vectors of one column, ``(batch, dim)``; 0 for a row without a text in it."""
        vectors = np.zeros((len(rows), next(iter(self.teacher[0].values())).dim), np.float32)
        asked: dict[tuple[int, str], list[int]] = {}
        for place, (row, name) in enumerate(zip(rows, names, strict=True)):
            if name is not None:
                asked.setdefault((row["teacher_source"], name), []).append(place)
        for (source, name), places in asked.items():
            numbers = np.array([rows[place]["teacher_row"] for place in places])
            vectors[places] = self.teacher[source][name].take(numbers)
        return torch.from_numpy(vectors)

    def _preprocess(self, texts: list[str], tasks: list[str], names: list[str | None]) -> dict[str, Any]:
        """Tokenize one column, rows of the same prompt together."""
        alike: dict[tuple[str | None, str | None], list[int]] = {}
        for row, (task, name) in enumerate(zip(tasks, names, strict=True)):
            prompt, side = (by_task.get(task, {}).get(name) for by_task in (self.prompts, self.router_mapping))
            alike.setdefault((prompt, side), []).append(row)
        parts = [
            self.preprocess_fn([texts[row] for row in numbers], prompt=prompt, task=side)
            for (prompt, side), numbers in alike.items()
        ]
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([row for numbers in alike.values() for row in numbers]).argsort()
        return {key: value[order] for key, value in self._stack(parts).items()}

    def _stack(self, parts: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Batches of different lengths as one; what only some have (an instruction mask) is 0 in the others."""
        if self.tokenizer is None:
            raise ValueError(
                "Rows of different prompts are padded to one batch by the tokenizer, and the collator has none. Pass "
                "tokenizer=model.tokenizer."
            )
        seq = max(part["input_ids"].shape[1] for part in parts)
        fill = {"input_ids": self.tokenizer.pad_token_id}
        stacked: dict[str, list[Tensor]] = {}
        for key in {key: None for part in parts for key, value in part.items() if isinstance(value, Tensor)}:
            for part in parts:
                rows = part.get(key, torch.zeros_like(part["input_ids"]))  # (rows, shorter seq)
                missing = seq - rows.shape[1]
                sides = (missing, 0) if self.tokenizer.padding_side == "left" else (0, missing)
                stacked.setdefault(key, []).append(pad(rows, sides, value=fill.get(key, 0)))
        return {key: torch.cat(rows) for key, rows in stacked.items()}
