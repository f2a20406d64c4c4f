"""The configuration of a run: its keys, typed once, and what must hold between them, checked before any work."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from datasets import IterableDataset
from peft import LoraConfig
from pydantic import BeforeValidator, Field, StrictBool, StrictStr
from sentence_transformers import SentenceTransformer
from sentence_transformers.base import BaseModel
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from st_llm_embed.losses import MNTPLoss, PretextLoss
from st_llm_embed.mining import mine_negatives
from st_llm_embed.mining.judges import is_model
from st_llm_embed.model import LENGTHS, LORA_ARGUMENTS, build_model
from st_llm_embed.modules import LLMBackbone
from st_llm_embed.recipes import RECIPES
from st_llm_embed.tasks import KINDS, Task
from st_llm_embed.training.configuration import Given
from st_llm_embed.training.schema import NewPath, Part, PathText, check, choice, fields_of, part
from st_llm_embed.training.stage_data import PRETEXT, READERS, read_pretext
from st_llm_embed.training.training_args import LLMEmbedTrainingArguments

if TYPE_CHECKING:
    from st_llm_embed.evaluation import TaskEvaluator  # which needs mteb

EBAE_EBAR, MNTP = "ebae-ebar", "mntp"
FROM_1 = {"ge": 1}
SHARE = {"ge": 0, "le": 1}
LIMITS = {
    **dict.fromkeys((*LENGTHS, "token_dim", "chunk_size"), FROM_1),
    **dict.fromkeys(("query_regularizer_weight", "document_regularizer_weight"), {"ge": 0}),
    **dict.fromkeys(("num_layers", "num_latents", "num_heads", "head_dim", "num_tokens", "r"), FROM_1),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), FROM_1
    ),
    **dict.fromkeys(
        ("early_stopping_patience", "batch_size", "tokens_per_batch", "matryoshka_dims", "dims", "save_total_limit"),
        FROM_1,
    ),
    **dict.fromkeys(("max_characters", "num_negatives", "range_max", "shard_size", "truncate_dim"), FROM_1),
    "sample": {"ge": 10},
    **dict.fromkeys(("distill_weight", "score_weight", "soft_label_weight", "contrastive_weight"), {"ge": 0}),
    **dict.fromkeys(("score_temperature", "soft_label_temperature"), {"gt": 0}),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "negatives"), {"ge": 0}),
    **dict.fromkeys(("warmup_steps", "dataloader_num_workers", "eval_delay"), {"ge": 0}),
    **dict.fromkeys(("eval_steps", "save_steps", "logging_steps", "lora_alpha", "matryoshka_weights"), {"gt": 0}),
    **dict.fromkeys(("temperature", "sampling_temperature", "mini_batch_size", "spread_weight", "weight"), {"gt": 0}),
    **dict.fromkeys(("warmup_ratio", "lora_dropout", "relative_margin", "judge_relative_margin"), SHARE),
    "mask_share": {"gt": 0, "le": 1},
    "seed": {"ge": 0, "lt": 1 << 32},
    "max_steps": {"ge": -1},  # -1: as many as the epochs have
    "n_dims_per_step": {"ge": -1},
}


@dataclass(frozen=True)
class Teach:
    """A teacher of a stage: the model learns its vectors, as ``distill_weight``, ``score_weight`` and
    ``contrastive_weight`` among the arguments say.

    Args:
        teacher: the folder or Hub id of a sentence-transformers model. Default: the data sets bring the vectors.
        revision: the branch, tag or commit of its repository.
        trust_remote_code: whether to run code of the teacher that this package does not ship.
        model_kwargs: arguments of its LLM's ``from_pretrained``, such as ``{dtype: bfloat16}``.
        truncate_dim: the number of first dimensions of its vectors to learn, of a Matryoshka teacher.
        instructions: whether it gets the tasks' instructions. Default: if its prompt for queries has a place for one.
        tokens_per_batch: the number of tokens that it encodes at once, padding included. Default: 2,048 on a CPU,
            32,768 elsewhere.
        projection: whether the model gets a projection into the teacher's space, a ``Dense`` layer, before the first
            step. Default: unless an earlier stage has a teacher.
        train_projection: whether the steps change it too. By default the LLM learns and it stays, as steps on it soon
            lose what the closed form has found; where scores alone are matched, all is trained.
        refit: whether the projection is fitted once more after the last step, to what the LLM has become.
        sample: the number of texts of the stage's data on which the projection is fitted, in closed form.
    """

    teacher: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    model_kwargs: dict[str, Any] | None = None
    truncate_dim: int | None = None
    instructions: bool | None = None
    tokens_per_batch: int | None = None
    projection: bool | None = None
    train_projection: bool = False
    refit: bool = False
    sample: int = 20_000


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Args:
        name: the name of the stage, and of its folder.
        data: the names of its data sets in the configuration; one of ``consecutive_texts`` makes it a pretext stage.
        arguments: arguments of ``LLMEmbedTrainingArguments``, over those of the configuration.
        model: what differs from the configuration's ``model`` in this stage: ``lora``, ``max_seq_length``,
            ``query_length``, ``document_length``. LoRA that a stage has and the next has not is merged before it.
        loss: in a pretext stage arguments of ``PretextLoss``, or with ``objective: mntp`` of ``MNTPLoss``;
            ``lm_head: base`` takes the LM head of the base whose head is not tied to its embeddings. Else those of
            sentence-transformers' ``MatryoshkaLoss`` around the contrastive loss, whose own settings are arguments
            (``temperature``, ``spread_weight``, ...).
        teach: a teacher, whose vectors the model learns.
        eval_data: the names of the data sets to evaluate on, as ``eval_strategy`` and ``eval_steps`` say.
        eval_tasks: the tasks to evaluate on besides, as the command ``evaluate`` takes them: folders in BEIR's layout,
            names of mteb's tasks.
        eval_split: the split of the folders among ``eval_tasks``.
        early_stopping_patience: the number of evaluations without a better figure after which the stage ends, with the
            best model: by ``metric_for_best_model``, or else the first of ``eval_tasks``, or the loss on the first of
            ``eval_data``.
    """

    name: str
    data: list[str]
    arguments: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    teach: Teach | None = None
    eval_data: list[str] = field(default_factory=list)
    eval_tasks: list[str] = field(default_factory=list)
    eval_split: str = "dev"
    early_stopping_patience: int | None = None

    @property
    def masks(self) -> bool:
        """Whether it is a pretext stage of masked next-token prediction."""
        return self.loss.get("objective") == MNTP


@dataclass(frozen=True)
class Loaded:
    """A trained model as the start, as it is: with its pooling, its prompts and its adapter.

    Args:
        load: the folder or Hub id of a sentence-transformers model.
        revision: the branch, tag or commit of its repository.
        trust_remote_code: whether to run code in it that this package does not ship.
        model_kwargs: arguments of the LLM's ``from_pretrained``, such as ``{dtype: bfloat16}``.
        lora: arguments of ``peft.LoraConfig``, to train by a new LoRA: one that the model has is merged first. False:
            that is merged, and the model trained in full. Default: as the model is, an adapter of its own trains on.
        max_seq_length, query_length, document_length: the largest number of tokens of a text, a query and a document,
            prompts included. Default: the model's own.
    """

    load: str | Path
    revision: str | None = None
    trust_remote_code: bool = False
    model_kwargs: dict[str, Any] | None = None
    lora: dict[str, Any] | Literal[False] | None = None
    max_seq_length: int | None = None
    query_length: int | None = None
    document_length: int | None = None


@dataclass(frozen=True)
class Mining:
    """Mining of hard negatives for a data set, before the first stage that trains on it. Beside these keys, the
    arguments of ``mine_negatives``.

    Args:
        teacher: the folder or Hub id of a sentence-transformers model, or the name of an earlier stage. It gets the
            task's instruction, unless its prompts have no place for one or ``query_prompt`` says otherwise.
        trust_remote_code: whether to run code of the teacher or the judge that this package does not ship.
        corpus: the documents to search besides the positives: what ``load_rows`` reads, or a folder in BEIR's layout.
        corpus_columns: what the corpus's columns are called, such as ``{text: body}``.
        judge: a second opinion on the candidates: the folder or Hub id of a cross-encoder or of an embedding model, or
            the name of an earlier stage; ``bm25``; or an LLM on an OpenAI-compatible server,
            ``http://localhost:8000/v1#model``. An embedding model and an LLM get the task's instruction. Stages with a
            ``soft_label_weight`` learn its scores.
    """

    teacher: str
    trust_remote_code: bool = False
    corpus: str | None = None
    corpus_columns: dict[str, str] = field(default_factory=dict)
    judge: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of the last stage's model, in ``output/results``; see the command ``evaluate``.

    Args:
        tasks: folders in BEIR's layout or with STS, pairs or classes, or names of mteb's tasks and benchmarks.
        split: the split of the folders' data.
        batch_size: the number of texts encoded at once.
        dims: the numbers of first dimensions that vectors are cut to besides.
        precision: how documents' vectors are kept besides: ``float32``, ``float16``, ``int8``, ``binary``,
            ``ubinary``. The table of both is in a sealed model's card, and the ranges of int8 beside its weights.
    """

    tasks: list[str]
    split: str = "test"
    batch_size: int = 32
    dims: list[int] = field(default_factory=list)
    precision: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sealing:
    """How the last stage's model is sealed, and what its card says.

    Args:
        license: the licence of the model, such as ``apache-2.0``. Default: its base's.
        samples: whether rows of the training data stay in the card.
        merge: whether LoRA is folded into the LLM, which else is saved as an adapter alone.
    """

    license: str | None = None
    samples: bool = False
    merge: bool = False


@dataclass(frozen=True)
class RunConfig:
    """A whole training run.

    Args:
        output: the folder of the run, made new.
        model: the arguments of ``build_model``: ``base``, ``recipe``, ``lora``, ``max_seq_length``, ... Or ``load``,
            the folder or Hub id of a trained model to begin from as it is.
        data: each data set by a name of one's own: ``read``, a builder of ``st_llm_embed.data``, and its arguments;
            ``instruction`` and other settings of its ``Task``, unless ``known_task`` knows the name; ``mine``, to
            mine hard negatives for it first; and ``teacher_embeddings``, files of a teacher's vectors.
        stages: the stages, in their order.
        arguments: the arguments of ``LLMEmbedTrainingArguments`` for all stages that they have an effect on.
        seed: the seed of everything.
        name: the name of the model, the title of its card.
        seal: whether to write the last stage's model as a folder that loads without this package, ``output/sealed``;
            or what its card says.
        evaluate: the evaluation of the last stage's model.
        vectors: the folder that keeps teachers' vectors, of mining and of teaching, which other runs may share.
            Default: ``output/vectors``.
        shared_stages: the folder that keeps the models of finished stages: a run takes from there those that another
            run began with in the same way, and adds its own. Default: none.
    """

    output: str | Path
    model: dict[str, Any]
    data: dict[str, dict[str, Any]]
    stages: list[Stage]
    arguments: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    name: str | None = None
    seal: bool | dict[str, Any] = False
    evaluate: Evaluation | None = None
    vectors: str | Path | None = None
    shared_stages: str | Path | None = None

    def projects(self, number: int) -> bool:
        """Whether a stage begins with a new projection into its teacher's space."""
        teach = self.stages[number].teach
        if teach is None or teach.projection is not None:
            return teach is not None and bool(teach.projection)
        return not any(earlier.teach for earlier in self.stages[:number])

    def is_projected(self, number: int) -> bool:
        """Whether the model of a stage has a projection into a teacher's space, new or of an earlier stage."""
        return any(map(self.projects, range(number + 1)))

    def model_of(self, stage: Stage) -> dict[str, Any]:
        """The model's settings in a stage."""
        return {**self.model, **stage.model}

    @property
    def model_class(self) -> type[BaseModel]:
        """The class of the models of a recipe; of one that is loaded, its folder says it."""
        return SentenceTransformer if "load" in self.model else RECIPES[self.model.get("recipe", "nv-embed")].model

    def differs(self, number: int) -> bool:
        """Whether a stage's model is made otherwise than that of the stage before."""
        return number > 0 and self.model_of(self.stages[number]) != self.model_of(self.stages[number - 1])


def _name(value: Any) -> Any:
    """A name that YAML reads as a number is a name."""
    return str(value) if type(value) is int else value


Name = Annotated[StrictStr, BeforeValidator(_name), Field(min_length=1)]
NOT_OF_RUNS = (  # set by the run, or without a meaning in one
    *("output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "local_rank"),
    "save_only_model",  # of which no stage could go on
)
FILES = {name: PathText | dict[str, Any] for name in ("accelerator_config", "deepspeed", "fsdp_config")}
ARGUMENTS = part("arguments", fields_of(LLMEmbedTrainingArguments, without=NOT_OF_RUNS, limits=LIMITS, kinds=FILES))
LORA = part("lora", fields_of(LoraConfig, only=LORA_ARGUMENTS, needed=(), limits=LIMITS))
LORA_OR_NOT = StrictBool | LORA
NOT_OF_TEXT = (
    *("model_name_or_path", "backend", "transformer_task", "modality_config", "module_output_name"),
    "query_expansion",
)
BACKBONE = {
    **fields_of(build_model, kinds={"base": PathText, "lora": LORA_OR_NOT}),
    **fields_of(LLMBackbone, without=NOT_OF_TEXT, limits=LIMITS),
    **fields_of(Transformer, without=NOT_OF_TEXT, limits=LIMITS),
}
MODELS: dict[str, type[Part]] = {
    name: part(
        f"model {name}",
        {"recipe": (Literal[name], Field("nv-embed" if name == "nv-embed" else ..., description="the recipe."))},
        BACKBONE,
        fields_of(recipe.pooling, without=("embedding_dimension",), limits=LIMITS),
    )
    for name, recipe in RECIPES.items()
}
MODELS["load"] = part(
    "load", fields_of(Loaded, kinds={"load": PathText, "lora": Literal[False] | LORA}, limits=LIMITS)
)
MODEL = choice(
    *MODELS.items(),
    key="recipe",
    of=lambda given: "load" if "load" in given else str(given.get("recipe", "nv-embed")),
    valid=f"Valid recipes: {', '.join(RECIPES)}.",
)
STAGE_MODEL = part("model", {name: BACKBONE[name] for name in ("lora", *LENGTHS)})
OF_PRETEXT: dict[str, Any] = {
    "objective": (
        Literal["ebae-ebar", "mntp"],
        Field(
            EBAE_EBAR,
            description="what the LLM learns of raw text: ``ebae-ebar``, LLaRA's two tasks, or ``mntp``, masked "
            "next-token prediction, for bidirectional attention.",
        ),
    ),
    "lm_head": (
        Literal["base"],
        Field(None, description="``base``: the base's LM head, frozen, where it is not tied to the input embeddings."),
    ),
}
PRETEXT_LOSS = fields_of(PretextLoss, without=("model", "lm_head"), limits=LIMITS)
MNTP_LOSS = fields_of(MNTPLoss, without=("model", "lm_head"), limits=LIMITS)
MATRYOSHKA = fields_of(MatryoshkaLoss, without=("model", "loss"), needed=(), limits=LIMITS)
LOSS = part("loss", OF_PRETEXT, PRETEXT_LOSS, MNTP_LOSS, MATRYOSHKA)
NOT_OF_MINING = ("dataset", "teacher", "corpus", "judge", "cache_folder", "show_progress_bar")
MINE = part(
    "mine",
    fields_of(Mining, kinds={"teacher": Name, "corpus": PathText, "judge": Name}),
    fields_of(mine_negatives, without=NOT_OF_MINING, limits=LIMITS),
)
TASK = fields_of(Task, without=("name", "negatives"), needed=(), limits=LIMITS, kinds={"kind": Literal[tuple(KINDS)]})
TAUGHT: dict[str, Any] = {
    "teacher_embeddings": (
        dict[str, PathText],
        Field({}, description="``.npy`` files of a teacher's vectors, by the column of texts that they are of."),
    )
}
MINED = {"mine": (MINE, Field(None, description="what hard negatives are mined by, before the rows are trained on."))}
COLUMNS: dict[str, Any] = {
    "columns": (
        dict[str, str],
        Field({}, description="what the columns are called: ``{anchor: question}``; renamed first."),
    )
}
READS = {PRETEXT: part(PRETEXT, {"read": (Literal[PRETEXT], ...)}, fields_of(read_pretext, limits=LIMITS))}
READS |= {
    name: part(
        name,
        {"read": (Literal[name], ...)},
        fields_of(reader, without=("streaming",), limits=LIMITS),  # sentence-transformers takes no streams of tasks
        COLUMNS,
        TASK,
        MINED,
        TAUGHT,
        open_ended=name == "load_dataset",
    )
    for name, reader in READERS.items()
}
DATA = choice(
    *READS.items(),
    key="read",
    of=lambda given: str(given.get("read")),
    valid=f"Valid: {', '.join(READS)}.",
)
TEACH = part("teach", fields_of(Teach, limits=LIMITS, kinds={"teacher": PathText}))
STAGE = part(
    "stage",
    fields_of(
        Stage,
        limits=LIMITS,
        kinds={
            "name": Name,
            "data": Annotated[list[Name], Field(min_length=1)],
            "arguments": ARGUMENTS,
            "model": STAGE_MODEL,
            "loss": LOSS,
            "teach": TEACH,
            "eval_data": list[Name],
            "eval_tasks": list[PathText],
        },
    ),
)
SEAL = part("seal", fields_of(Sealing))
TASKS = Annotated[list[PathText], Field(min_length=1)]
RUN = part(
    "run",
    fields_of(
        RunConfig,
        limits=LIMITS,
        kinds={
            "output": NewPath,
            "vectors": NewPath,
            "shared_stages": NewPath,
            "model": MODEL,
            "data": dict[Name, DATA],  # type: ignore[valid-type]
            "stages": Annotated[list[STAGE], Field(min_length=1)],  # type: ignore[valid-type]
            "arguments": ARGUMENTS,
            "seal": StrictBool | SEAL,
            "evaluate": part("evaluate", fields_of(Evaluation, limits=LIMITS, kinds={"tasks": TASKS})),
        },
    ),
)


def read_run(given: Given) -> RunConfig:
    """The configuration, with its defaults.

    Raises:
        ValueError: naming the part that is missing, unknown, of another type, or impossible, and the valid ones.
    """
    with given.naming():
        values = check(RUN, given.values, given.folder)
    values["stages"] = [
        Stage(**{**stage, **({"teach": Teach(**stage["teach"])} if stage.get("teach") is not None else {})})
        for stage in values["stages"]
    ]
    if "evaluate" in values:
        values["evaluate"] = Evaluation(**values["evaluate"])
    config = RunConfig(**values)
    if len(config.data) < len(given.values["data"]):
        with given.naming("data"):
            raise ValueError("two data sets have one name, as a number and as text.")
    for number, stage in enumerate(config.stages):
        with given.naming("stages", number):
            if "eval_split" in given.values["stages"][number] and not stage.eval_tasks:
                raise ValueError("has eval_split, and no eval_tasks whose split it could be. Leave it out.")
            _check_stage(stage, config)
    for name, settings in config.data.items():
        if "mine" in settings and settings.get("teacher_embeddings"):
            with given.naming("data", name):
                raise ValueError("has teacher_embeddings, and mine, whose negatives they do not know. Leave one out.")
        if "mine" in settings:
            with given.naming("data", name, "mine"):
                check_name(name)
                mine = settings["mine"]
                mine["teacher"] = _teacher(mine["teacher"], "teacher", name, config, given.folder)
                if (judge := mine.get("judge")) is not None and is_model(judge):
                    mine["judge"] = _teacher(judge, "judge", name, config, given.folder)
    return config


def _teacher(teacher: str, role: str, name: str, config: RunConfig, folder: Path) -> str:
    """The name of a stage, or the path or Hub id of a model that mines for a data set, as ``role`` says.

    Raises:
        ValueError: for a stage that is not finished when the data set's first begins.
    """
    stages = [stage.name for stage in config.stages]
    if teacher not in stages:
        return check(part("mine", {role: (PathText, ...)}), {role: teacher}, folder)[role]
    first = next((i for i, stage in enumerate(config.stages) if name in (*stage.data, *stage.eval_data)), 0)
    if stages.index(teacher) >= first:
        raise ValueError(
            f"the {role} {teacher!r} is a stage that comes after the negatives are needed, in {stages[first]!r}. "
            "Name an earlier one, or a model."
        )
    return teacher


def check_name(name: str) -> None:
    """Check that a name can be that of a folder.

    Raises:
        ValueError: if it cannot.
    """
    is_plain = all(kind(name).name == name for kind in (PurePosixPath, PureWindowsPath))
    if not is_plain or "\0" in name or len(name.encode()) > 200:
        raise ValueError(f"name={name[:80]!r} must be that of a folder: without slashes, at most 200 bytes.")


def check_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``build_model``, with numbers in place of their text.

    Raises:
        ValueError: for a name that neither it nor the backbone nor the recipe's pooling takes, or a value of another
            type.
    """
    given = Given(settings)
    with given.naming():
        return check(part("build", {"model": (MODEL, ...)}), {"model": settings})["model"]


def _check_stage(stage: Stage, config: RunConfig) -> None:
    """What must hold between the keys of a stage.

    Raises:
        ValueError: for what does not.
    """
    if absent := [name for name in (*stage.data, *stage.eval_data) if name not in config.data]:
        raise ValueError(f"the data sets {absent} are not there. There are: {', '.join(config.data)}.")
    check_name(stage.name)
    if [other.name for other in config.stages].count(stage.name) > 1:
        raise ValueError(f"name={stage.name!r} is another stage's too. Give each one of its own.")
    if len(set(stage.data)) < len(stage.data) or len(set(stage.eval_data)) < len(stage.eval_data):
        raise ValueError(f"names a data set twice: {[*stage.data, *stage.eval_data]}.")
    pretext = [name for name in stage.data if config.data[name]["read"] == PRETEXT]
    if pretext and len(stage.data) > 1:
        raise ValueError(f"has pretext rows beside others: {stage.data}. Give them one stage each.")
    other_kind = any(bool(pretext) != (config.data[name]["read"] == PRETEXT) for name in stage.eval_data)
    if other_kind or (pretext and len(stage.eval_data) > 1):
        raise ValueError(f"has eval_data {stage.eval_data} of another kind than its data {stage.data}.")
    _check_loss(stage, bool(pretext))
    if pretext and stage.masks and "base" in config.model:
        recipe = config.model.get("recipe", "nv-embed")
        attention = config.model.get("attention", RECIPES[recipe].defaults["attention"])
        if attention != "bidirectional":
            raise ValueError(
                f"has objective: {MNTP}, which predicts tokens from both sides, and the model has attention: "
                f"{attention}. Valid: bidirectional. Say model: {{attention: bidirectional}}, or leave objective out."
            )
    if stage.model.get("lora") is True and "load" in config.model:
        raise ValueError("has lora: true, the recipe's, and a loaded model has none. Say which: lora: {r: 16}.")
    if stage.loss.get("lm_head") and "load" in config.model:
        raise ValueError("has lm_head: base, and the model is loaded, without a base. Give it a model with a base.")
    if stage.loss and not pretext:
        dims, weights = stage.loss.get("matryoshka_dims"), stage.loss.get("matryoshka_weights")
        if not dims:
            raise ValueError("has a loss without matryoshka_dims, the widths: such as [768, 256, 64].")
        if weights is not None and len(weights) != len(dims):
            raise ValueError(f"has matryoshka_weights={weights}, and must have one for each of {dims}.")
        if stage.loss.get("n_dims_per_step", -1) > len(dims):
            raise ValueError(f"has n_dims_per_step={stage.loss['n_dims_per_step']}, and {len(dims)} matryoshka_dims.")
    evaluated = [*stage.eval_data, *stage.eval_tasks]
    if stage.early_stopping_patience is not None and not evaluated:
        raise ValueError(
            f"has early_stopping_patience={stage.early_stopping_patience}, and neither eval_data nor eval_tasks to "
            "stop by."
        )
    if stage.teach is not None and pretext:
        raise ValueError(f"has teach, and data of {PRETEXT}, which no teacher is asked about. Leave out one of them.")
    if stage.eval_tasks and pretext:
        raise ValueError("has eval_tasks, and pretext data, after which there is nothing to retrieve with yet.")


def _check_loss(stage: Stage, pretext: bool) -> None:
    """Check that all keys of a stage's loss are of one loss.

    Raises:
        ValueError: for keys of another.
    """
    own, other = (MNTP, EBAE_EBAR) if stage.masks else (EBAE_EBAR, MNTP)
    no_data = f"has no data of {PRETEXT}. Leave it out."
    if pretext:
        others = {
            "PretextLoss" if stage.masks else "MNTPLoss": (
                PRETEXT_LOSS if stage.masks else MNTP_LOSS,
                f"its objective is {own}. Say objective: {other}, or leave it out.",
            ),
            "MatryoshkaLoss": (MATRYOSHKA, f"its data are of {PRETEXT}. Leave it out."),
        }
    else:
        others = {"PretextLoss": (PRETEXT_LOSS, no_data), "MNTPLoss": (MNTP_LOSS, no_data)}
        others["a pretext stage"] = (OF_PRETEXT, no_data)
    for name, (fields, reason) in others.items():
        if misplaced := sorted(stage.loss.keys() & fields.keys()):
            raise ValueError(f"has in its loss {', '.join(misplaced)}, of {name}, and {reason}")


def stage_arguments(
    config: RunConfig,
    data: Mapping[str, Any],
    given: Given,
    evaluators: Mapping[str, TaskEvaluator],
    classes: Sequence[type[BaseModel]],
) -> list[dict[str, Any]]:
    """The training arguments of each stage: its own, and those of the configuration that are not for others only.

    Args:
        config: the configuration.
        data: each data set, as ``read_data`` gives it.
        given: the configuration as it was given, for messages.
        evaluators: what evaluates a stage's ``eval_tasks``, by the stage's name.
        classes: the class of each stage's model.

    Raises:
        ValueError: naming the stage whose arguments cannot be, or have no effect.
    """
    shared = {"report_to": [], "seed": config.seed, **config.arguments}
    metrics = {stage.name: _metrics(stage, data, evaluators.get(stage.name)) for stage in config.stages}
    merged = []
    for number, stage in enumerate(config.stages):
        with given.naming("stages", number):
            if (stage.eval_data or stage.eval_tasks) and "eval_strategy" not in {**shared, **stage.arguments}:
                raise ValueError(
                    "has eval_data or eval_tasks, and no eval_strategy. Say when to evaluate, such as eval_strategy: "
                    "steps and eval_steps: 100."
                )
            merged.append(_best_model(stage, metrics[stage.name], {**shared, **stage.arguments}))
    tasks = [
        [part[1] for part in map(data.get, stage.data) if isinstance(part, tuple)] or None for stage in config.stages
    ]
    evaluated = [bool(stage.eval_data or stage.eval_tasks) for stage in config.stages]
    idle = []
    for number, (arguments, stage_tasks, evaluates) in enumerate(zip(merged, tasks, evaluated, strict=True)):
        with given.naming("stages", number):
            args = LLMEmbedTrainingArguments("unused", **arguments)
            idle.append(
                args.idle(stage_tasks, False, config.stages[number].teach is not None, classes[number])
                | ({} if evaluates else dict.fromkeys(OF_EVALUATION, NOT_EVALUATED))
            )
    for number, (stage, arguments) in enumerate(zip(config.stages, merged, strict=True)):
        for name in set(idle[number]) & set(arguments) - set(stage.arguments):
            if not all(name in others for others in idle):
                del arguments[name]
        with given.naming("stages", number):
            args = LLMEmbedTrainingArguments("unused", **arguments)
            args.check_effect(tasks[number], False, stage.teach is not None, classes[number])
            _check_arguments(stage, args, arguments, config.arguments, idle[number], data, metrics[stage.name])
    return merged


OF_EVALUATION = (
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("eval_accumulation_steps", "prediction_loss_only", "bf16_full_eval", "fp16_full_eval"),
)
NOT_EVALUATED = "the stage has neither eval_data nor eval_tasks. Give it some, or leave it out"


def _check_arguments(
    stage: Stage,
    args: LLMEmbedTrainingArguments,
    arguments: Mapping[str, Any],
    shared: Mapping[str, Any],
    idle: Mapping[str, str],
    data: Mapping[str, Any],
    metrics: list[str],
) -> None:
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        raise ValueError(f"max_steps={args.max_steps}, num_train_epochs={args.num_train_epochs:g} train nothing.")
    steps_of_all = arguments.get("max_steps", -1) > 0 and "max_steps" not in stage.arguments
    if args.max_steps > 0 and (
        "num_train_epochs" in stage.arguments or (steps_of_all and "num_train_epochs" in shared)
    ):
        raise ValueError(
            f"num_train_epochs={args.num_train_epochs:g} has no effect beside max_steps={args.max_steps}. Leave one "
            "out; in a stage, max_steps: -1 takes back that of all stages."
        )
    if any(isinstance(data[name], IterableDataset) for name in stage.data) and args.max_steps <= 0:
        raise ValueError(
            "its data stream, and a stream's length is not known. Say max_steps, such as max_steps: 1000."
        )
    if args.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("use_liger_kernel needs liger-kernel. Fix: pip install liger-kernel, or leave it out.")
    for name in OF_EVALUATION:
        if name in idle and name in arguments:
            raise ValueError(f"the training argument {name}={arguments[name]!r} has no effect: {idle[name]}.")
    if not metrics:
        return
    if args.eval_strategy == "no":
        raise ValueError("has eval_data or eval_tasks, and eval_strategy: no. Leave out one of them.")
    chosen = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
    if chosen not in metrics:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} is not measured. There are: {', '.join(metrics)}."
        )


def _metrics(stage: Stage, data: Mapping[str, Any], evaluator: TaskEvaluator | None) -> list[str]:
    """The figures by which the best model of a stage can be told."""
    # The host's names: with tasks, data sets come by name.
    losses = [f"eval_{name}_loss" if isinstance(data[name], tuple) else "eval_loss" for name in stage.eval_data]
    return [f"eval_{metric}" for metric in (evaluator.metrics if evaluator else ())] + losses


def _best_model(stage: Stage, metrics: list[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, and those by which the best model is told and kept."""
    if not metrics:
        return dict(arguments)
    metric = metrics[0]
    best: dict[str, Any] = {"metric_for_best_model": metric, "greater_is_better": not metric.endswith("_loss")}
    if stage.early_stopping_patience is not None:
        best["load_best_model_at_end"] = True
        best["restore_callback_states_from_checkpoint"] = True  # a resumed run counts on
        if not {"save_strategy", "save_steps"} & arguments.keys():  # what is evaluated must be there to be kept
            best |= {
                f"save_{key}": arguments[f"eval_{key}"] for key in ("strategy", "steps") if f"eval_{key}" in arguments
            }
    if "metric_for_best_model" in arguments:
        del best["greater_is_better"]
    return {**best, **arguments}
