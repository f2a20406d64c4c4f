"""Training arguments: sentence-transformers' own, and the decisions of NV-Embed's recipe."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments, SparseEncoder
from sentence_transformers.base import BaseModel
from transformers.trainer_utils import HubStrategy

from st_llm_embed.tasks import Task

OF_A_TEACHER = ("distill_weight", "score_weight")
OF_SOFT_LABELS = ("soft_label_weight", "soft_label_temperature")
OF_SPARSE = ("query_regularizer_weight", "document_regularizer_weight")
OF_DISTILLATION = (*OF_A_TEACHER, *OF_SOFT_LABELS, "score_temperature", "contrastive_weight")
OF_THE_LOSS = (
    *("temperature", "false_negative_margin", "mini_batch_size", "gather_across_devices", "spread_weight"),
    *OF_DISTILLATION,
    *OF_SPARSE,
)
OF_IN_BATCH_NEGATIVES = ("false_negative_margin", "gather_across_devices")
OF_THE_HOSTS_BATCHES = ("batch_sampler", "multi_dataset_batch_sampler")
NOT_OF_THE_HOST = ("label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy")


@dataclass
class LLMEmbedTrainingArguments(SentenceTransformerTrainingArguments):
    """Adds what ``LLMEmbedTrainer`` reads where it gets ``tasks``. Of the host's own, ``train_sampling_strategy=
    "group_by_length"`` gives each step rows of like length, of which less is padding.

    Args:
        stage: NV-Embed's stage: 1 for retrieval with in-batch and hard negatives; 2 for everything blended, own hard
            negatives only.
        temperature: the temperature of the contrastive loss. Default: 0.02; of sparse vectors, whose dot products have
            no bound, 1.
        in_batch_negatives: whether every task has in-batch negatives. Default: in stage 1 where the task allows
            them, in stage 2 nowhere.
        blended: whether a batch draws from all tasks, as NV-Embed's do, or a step from one, the same on all processes.
            Default: in stage 2.
        sampling_temperature: the temperature of the tasks' shares, which go by their sizes to the power 1 / this;
            above 1 they are more even.
        false_negative_margin: the share of the positive's score, such as 0.95, above which in-batch negatives are left
            out.
        mini_batch_size: how many texts to embed at a time, twice, to fit a large batch into memory (GradCache).
        gather_across_devices: whether other processes' rows count for in-batch negatives.
        spread_weight: the weight of the spread-out regulariser, such as 0.1, which keeps vectors apart and so lets
            them be compressed. Default: without it.
        query_regularizer_weight, document_regularizer_weight: of a model of sparse vectors, the weights of SPLADE's
            FLOPS regulariser (arXiv 2109.10086), which grow from 0 over the first third of the steps: the larger, the
            fewer tokens have a weight.
        distill_weight: where there is a teacher, the weight of the match with its vectors (cosine).
        score_weight: the weight of the match with its scores over the documents of the batch.
        soft_label_weight: the weight of the match with the data's column ``scores``.
        contrastive_weight: the weight of the contrastive loss beside a teacher or scores; 0 leaves it out.
        score_temperature: the temperature of the cosines of both, in both matches of scores.
        soft_label_temperature: the temperature of the column ``scores``: 1 for the logits of a cross-encoder.

    Raises:
        ValueError: for another stage, a number that is not positive, or ``push_to_hub`` during training.
    """

    stage: int = field(default=1, metadata={"help": "1: in-batch and hard negatives. 2: own hard negatives only."})
    temperature: float | None = field(default=None, metadata={"help": "Temperature of the contrastive loss."})
    in_batch_negatives: bool | None = field(default=None, metadata={"help": "For every task. Default: by stage."})
    blended: bool | None = field(default=None, metadata={"help": "All tasks in a batch. Default: in stage 2."})
    sampling_temperature: float = field(default=1.0, metadata={"help": "Tasks' shares by size ** (1 / this)."})
    false_negative_margin: float | None = field(default=None, metadata={"help": "Share of the positive's score."})
    mini_batch_size: int | None = field(default=None, metadata={"help": "Texts embedded at a time (GradCache)."})
    gather_across_devices: bool = field(default=False, metadata={"help": "In-batch negatives of all processes."})
    spread_weight: float | None = field(default=None, metadata={"help": "Weight of the spread-out regulariser."})
    query_regularizer_weight: float = field(default=5e-5, metadata={"help": "Sparsity of sparse queries."})
    document_regularizer_weight: float = field(default=3e-5, metadata={"help": "Sparsity of sparse documents."})
    distill_weight: float = field(default=1.0, metadata={"help": "Weight of the match with a teacher's vectors."})
    score_weight: float = field(default=0.0, metadata={"help": "Weight of the match with a teacher's scores."})
    soft_label_weight: float = field(default=0.0, metadata={"help": "Weight of the match with the column scores."})
    contrastive_weight: float = field(default=1.0, metadata={"help": "Weight of the contrastive loss beside these."})
    score_temperature: float = field(default=0.05, metadata={"help": "Temperature of cosines in matches of scores."})
    soft_label_temperature: float = field(default=1.0, metadata={"help": "Temperature of the column scores."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in (1, 2):
            raise ValueError(
                f"stage={self.stage!r} is unknown. Valid stages: 1 (retrieval, in-batch and hard negatives) and 2 "
                "(everything, own hard negatives only)."
            )
        for name in (
            "temperature",
            "sampling_temperature",
            "false_negative_margin",
            "mini_batch_size",
            "spread_weight",
            "score_temperature",
            "soft_label_temperature",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} must be positive.")
        for name in (*OF_A_TEACHER, *OF_SPARSE, "soft_label_weight", "contrastive_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be 0 or more.")
        if self.blended is None:
            self.blended = self.stage == 2
        if self.accelerator_config.dispatch_batches is None:
            # Of a stream, the first process would else cut all processes' rows out of batches padded to other lengths.
            self.accelerator_config.dispatch_batches = False
        if self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"hub_strategy={self.hub_strategy.value!r} uploads checkpoints, whose modules load only where this "
                "package is installed; sealed they could not be resumed from. Use hub_strategy='end', which publishes "
                "the model once, when save_model or push_to_hub is called."
            )

    def in_batch(self, task: Task) -> bool:
        """Whether a task's rows are each other's negatives."""
        if self.in_batch_negatives is not None:
            return self.in_batch_negatives
        return self.stage == 1 and bool(task.in_batch_negatives)

    @property
    def by_length(self) -> bool:
        """Whether the rows of a step are of like length."""
        strategy = getattr(self, "train_sampling_strategy", "random")  # which transformers 5.2 does not know
        return strategy == "group_by_length" and not self.blended

    def idle(
        self,
        tasks: Collection[Task] | None,
        own_loss: bool,
        taught: bool = False,
        model: type[BaseModel] | None = SentenceTransformer,
    ) -> dict[str, str]:
        """The arguments that have no effect on a trainer, each with the reason and what to do instead.

        Args:
            tasks: the trainer's tasks; None if it has none.
            own_loss: whether the trainer is given a loss.
            taught: whether there is a teacher.
            model: the class of the model; None where it is not known yet.
        """
        reasons = dict.fromkeys(NOT_OF_THE_HOST, "sentence-transformers' trainer does not take it. Leave it out")
        reasons["data_seed"] = "the order of the rows is that of seed. Set that"
        if tasks is None:
            why = "it is read with tasks=[Task(...), ...] only. Give a loss of your own its settings itself"
            return reasons | dict.fromkeys(OF_TASKS, why)
        if self.by_length:
            del reasons["train_sampling_strategy"]
        else:
            why = "tasks= make the batches, at random or, unless blended, group_by_length"
            reasons["train_sampling_strategy"] = f"{why}. Leave it out"
        why = "tasks= make the batches. Set blended, sampling_temperature or the tasks' weights instead"
        reasons |= dict.fromkeys(OF_THE_HOSTS_BATCHES, why)
        if not any(map(self.in_batch, tasks)):
            why = "no task has in-batch negatives in this stage. Leave it out"
            reasons |= dict.fromkeys(OF_IN_BATCH_NEGATIVES, why)
        if not taught:
            why = (
                "there is no teacher. Give the trainer one, in a configuration teach: {teacher: ...}, or leave it out"
            )
            reasons |= dict.fromkeys(OF_A_TEACHER, why)
        if not self.soft_label_weight:
            reasons["soft_label_temperature"] = "soft_label_weight is 0. Raise that, or leave it out"
            if not taught:
                why = "there is nothing to learn beside the contrastive loss: no teacher, and no soft_label_weight"
                reasons["contrastive_weight"] = f"{why}. Leave it out"
        if not self.soft_label_weight and not (taught and self.score_weight):
            reasons["score_temperature"] = "no scores are matched. Give score_weight a value, or leave it out"
        if not self.contrastive_weight:
            why = "contrastive_weight is 0. Leave it out"
            reasons |= dict.fromkeys(("temperature", "false_negative_margin"), why)
        if model is not None and not issubclass(model, SparseEncoder):
            reasons |= dict.fromkeys(OF_SPARSE, "the model has no sparse vectors. Leave it out")
        if model is not None and not issubclass(model, SentenceTransformer):
            reasons["spread_weight"] = f"it is of one dense vector, and a {model.__name__} has none. Leave it out"
        if own_loss:
            why = "the loss is one of your own. Give it the setting: InstructionContrastiveLoss(model, scale=1 / 0.02)"
            reasons |= dict.fromkeys(OF_THE_LOSS, why)
        return reasons

    def check_effect(
        self,
        tasks: Collection[Task] | None,
        own_loss: bool,
        taught: bool = False,
        model: type[BaseModel] | None = SentenceTransformer,
    ) -> None:
        """Check that each argument that is set has an effect. Arguments: see ``idle``.

        Raises:
            ValueError: for an argument that is ``idle`` and not at its default.
        """
        defaults = {argument.name: argument.default for argument in fields(self)} | {"blended": self.stage == 2}
        for name, why in self.idle(tasks, own_loss, taught, model).items():
            value = getattr(self, name, None)
            if name in defaults and value != defaults[name]:  # transformers 5.2 does not know all
                raise ValueError(f"The training argument {name}={value!r} has no effect: {why}.")


OF_TASKS = tuple(
    {argument.name for argument in fields(LLMEmbedTrainingArguments)}
    - {argument.name for argument in fields(SentenceTransformerTrainingArguments)}
)
