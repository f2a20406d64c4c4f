"""A model as mteb calls it, each task under the prompt that the model saved for it.

mteb's own wrapper drops saved prompts whose name is not an mteb task's, and a model trained with instructions needs
one for every task. Models of several vectors or of sparse ones retrieve by their own similarity; how many bytes their
documents take is counted on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from mteb.abstasks import AbsTask, AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType
from sentence_transformers import MultiVectorEncoder, SparseEncoder
from sentence_transformers.base import BaseModel
from torch import Tensor

from st_llm_embed.tasks import (
    DOCUMENT,
    OF_DOCUMENTS,
    QUERY,
    SIMILARITY,
    TYPES,
    Task,
    known_task,
    prompt_of,
    same_task,
    takes_instructions,
)


class PromptedEncoder(AbsEncoder):
    """What mteb evaluates.

    Args:
        model: the model to evaluate.
        name: the name of the model in results.
        revision: the commit of the model's repository, or a hash of its files; results are kept by it.
        settings: the settings of the model that the scores depend on; results are kept by them too.
    """

    def __init__(self, model: BaseModel, name: str, revision: str, settings: Mapping[str, Any] | None = None) -> None:
        self.model = model
        self.index: dict[str, Counter[str]] = {}  # documents and bytes of their vectors, by task
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": revision,
                "max_tokens": model.max_seq_length,
                "embed_dim": model.get_embedding_dimension(),
                "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
                "framework": ["Sentence Transformers", "PyTorch"],
                "experiment_kwargs": dict(settings) if settings else None,
            }
        )

    def prompt(self, task: TaskMetadata, side: PromptType | None = None) -> str:
        """The prompt of a task's queries, documents, or symmetric texts (``side=None``); "" for none.

        For queries and symmetric texts, the first of: the model's prompt by the task's name, or that and ``-query``;
        its prompt by mteb's name of the task's type, such as ``Retrieval-query`` or ``STS``; for a model with a
        template, this package's or mteb's instruction for the task in it; the model's ``query`` or ``similarity``
        prompt, or its default. For documents, the model's prompt by the task's name or type and ``-document``, or what
        ``encode_document`` gives them.
        """
        prompts, default = self.model.prompts, self.model.default_prompt_name
        suffix = OF_DOCUMENTS if side == PromptType.document else ""
        # The last first: what a task of a training left comes after what the model had, perhaps in mteb's spelling.
        for name, prompt in reversed(prompts.items()):
            if name.endswith(suffix) and same_task(name.removesuffix(suffix), task.name):
                return prompt or ""
            if side == PromptType.query and same_task(name.removesuffix("-query"), task.name):
                return prompt or ""
        if side == PromptType.document:
            return prompt_of((f"{task.type}{OF_DOCUMENTS}", *DOCUMENT), prompts, default)
        of_type = (f"{task.type}-query", task.type) if side else (task.type,)
        if not any(name in prompts for name in of_type) and takes_instructions(prompts, default):
            kind = "retrieval" if side else next((kind for kind, name in TYPES.items() if name == task.type), "sts")
            if instruction := _instruction(task):
                return Task(task.name, instruction, kind).encoding_prompt(prompts, default)
        return prompt_of((*of_type, *(QUERY if side else SIMILARITY)), prompts, default)

    def main_prompt(self, task: AbsTask) -> str:
        """The prompt of a task's queries, or of its texts where all are of one sort."""
        return self.prompt(task.metadata, PromptType.query if isinstance(task, AbsTaskRetrieval) else None)

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Any:
        """Embeddings ``(texts, dim)`` of the batches of a data loader; of several vectors a list of ``(tokens, dim)``.
        Called by mteb."""
        texts = [text for batch in inputs for text in batch["text"]]
        encoders = {PromptType.query: self.model.encode_query, PromptType.document: self.model.encode_document}
        encode = encoders.get(prompt_type, self.model.encode)
        embeddings = encode(texts, prompt=self.prompt(task_metadata, prompt_type), **kwargs)
        if prompt_type == PromptType.document:
            counted = {"documents": len(texts), "bytes": bytes_of(embeddings)}
            self.index.setdefault(task_metadata.name, Counter()).update(counted)
        if prompt_type is None and isinstance(self.model, SparseEncoder):  # for classifiers and clusters
            return embeddings.to_dense().cpu().numpy()
        return embeddings

    def similarity(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> Tensor:
        return self.model.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> Tensor:
        return self.model.similarity_pairwise(embeddings1, embeddings2)


def bytes_of(embeddings: np.ndarray | Tensor | Sequence[Tensor]) -> int:
    """The bytes of vectors in float32; of sparse ones, of their weights and of the numbers of their tokens."""
    if isinstance(embeddings, np.ndarray):
        return 4 * embeddings.size
    if isinstance(embeddings, Tensor):
        return 8 * len(embeddings.coalesce().values()) if embeddings.is_sparse else 4 * embeddings.numel()
    return sum(map(bytes_of, embeddings))


def check_tasks(kind: type[BaseModel], tasks: Iterable[AbsTask]) -> None:
    """Check that the vectors of a class of models can be evaluated on some tasks.

    Raises:
        ValueError: for tasks other than retrieval and reranking of a model of several vectors.
    """
    if not issubclass(kind, MultiVectorEncoder):
        return
    if others := [task.metadata.name for task in tasks if not isinstance(task, AbsTaskRetrieval)]:
        raise ValueError(
            f"The tasks {others} compare or classify single vectors, and a MultiVectorEncoder has one for each token. "
            "Valid: retrieval and reranking."
        )


def _instruction(task: TaskMetadata) -> str | None:
    try:
        return known_task(task.name).instruction
    except ValueError:
        return task.prompt.get("query") if isinstance(task.prompt, Mapping) else task.prompt
