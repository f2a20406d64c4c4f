"""What the contrastive loss must know of a batch's rows beside their embeddings, as one matrix of integers.

The host hands a loss one tensor beside the embeddings, ``label``. For rows of tasks it is ``(batch, 2 + columns)``:

    group | class | a number for the text of anchor, positive, negative_1, ..., negative_n

Rows of one group are each other's negatives. Texts have the same number where they are the same. ``NONE`` in the place
of a group says "own negatives only", of a class "none known", of a text "there is none in this row".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from st_llm_embed.data.normal_form import normal_form

NONE = -1


@dataclass
class RowLabels:
    """The labels of a batch.

    Args:
        group: ``(batch,)``, the number of the row's group, or NONE.
        label: ``(batch,)``, the class of anchor and positive, or NONE.
        texts: ``(batch, columns)``, the numbers of the row's texts, or NONE. None where no texts are known.
    """

    group: Tensor
    label: Tensor
    texts: Tensor | None

    def pack(self) -> Tensor:
        """The matrix ``(batch, 2 + columns)``."""
        texts = [] if self.texts is None else [self.texts]
        return torch.cat([self.group.unsqueeze(1), self.label.unsqueeze(1), *texts], dim=1)

    @classmethod
    def unpack(cls, labels: Tensor | None, in_batch_negatives: bool, anchor: Tensor) -> RowLabels:
        """The labels of such a matrix; or of the host's ``(batch,)`` classes, or of nothing.

        Args:
            labels: the labels as the loss gets them.
            in_batch_negatives: whether all rows are each other's negatives, where the labels do not say.
            anchor: ``(batch, dim)``, for the number of rows and the device.

        Raises:
            ValueError: for labels that are no whole numbers.
        """
        if labels is not None and labels.ndim == 2:
            return cls(labels[:, 0], labels[:, 1], labels[:, 2:])
        if labels is not None and (labels.is_floating_point() or labels.dtype == torch.bool):
            raise ValueError(
                f"The labels are {labels.dtype}, such as {labels[:3].tolist()}. The loss reads whole numbers, a row's "
                "class, and spares the rows of a class each other's positives. Fix: remove the column from the data "
                "set if it holds scores, or marks that the two texts match."
            )
        none = torch.full((len(anchor),), NONE, device=anchor.device)
        group = torch.zeros_like(none) if in_batch_negatives else none
        return cls(group, none if labels is None else labels.to(torch.long), None)


def number_texts(texts: Sequence[str]) -> np.ndarray:
    """``(texts,)``: 63 bits of a hash of each, the same in every process and for every spelling of a text."""
    forms = np.array([normal_form(text) for text in texts], dtype=object)
    return (pd.util.hash_array(forms, categorize=False) >> np.uint64(1)).astype(np.int64)
