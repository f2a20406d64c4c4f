"""One call evaluates a model on mteb's tasks and local ones, under its saved prompts.

Results are mteb's own files, kept by the model's revision, its precision and its attention: what is there already for
the data as they are is not computed again, so an interrupted evaluation goes on.
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import mteb
import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from mteb.abstasks import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.results import TaskResult
from sentence_transformers import SentenceTransformer
from sentence_transformers.base import BaseModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from st_llm_embed.encoding.ranges import RANGES
from st_llm_embed.evaluation.encoder import PromptedEncoder, check_tasks
from st_llm_embed.evaluation.local_tasks import LocalTask, local_task
from st_llm_embed.evaluation.model_names import model_names
from st_llm_embed.evaluation.query_scores import keep_query_scores, kept_query_scores, measure_of, score_queries
from st_llm_embed.files import check_writable, hash_files, read_json, write_json, written_beside
from st_llm_embed.trust import fetch, left_by_trainer, load_any
from st_llm_embed.version import __version__

logger = logging.getLogger(__name__)
OFFLINE = (ConnectionError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)


@dataclass(frozen=True)
class Evaluated:
    """What ``evaluate`` gives.

    Args:
        results: the results of each task, as mteb has them.
        prompts: the prompt of each task's queries, or of its texts where all are of one sort; "" for none.
        table: the main scores as a table in Markdown.
        folder: the folder in which both are.
    """

    results: list[TaskResult]
    prompts: list[str]
    table: str
    folder: Path


def evaluate(
    source: str | Path,
    tasks: Sequence[str | Path],
    output: str | Path,
    *,
    split: str = "test",
    batch_size: int = 32,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    max_seq_length: int | None = None,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Evaluated:
    """Evaluate a model.

    Args:
        source: the model's folder or Hub id.
        tasks: the names of mteb's tasks or benchmarks, and folders in the layouts of ``local_tasks``.
        output: the folder of results; those in it already are kept.
        split: the split of the local tasks.
        batch_size: the number of texts encoded at once.
        dtype, attn_implementation: the precision and the attention of the LLM, such as ``bfloat16`` and ``sdpa``.
            Default: the model's own.
        max_seq_length: the largest number of tokens of a text, prompt included. Default: the model's own.
        device: the device to encode on, such as ``cuda`` or ``cpu``. Default: the best there is.
        revision: the branch, tag or commit of the model's repository.
        trust_remote_code: whether to run code in ``source`` that this package does not ship.

    Raises:
        FileNotFoundError: for a split that a folder does not have.
        OSError: if ``output`` cannot be written.
        ValueError: for an unknown task, two of one name, a folder in another layout or with something else where text
            or a judgement is expected, a setting that is none, unknown code in the model, texts longer than it takes,
            or tasks other than retrieval of a model of several vectors.
        ConnectionError: for a task whose data are on the Hub, while it cannot be reached.
    """
    check_settings(batch_size, dtype, attn_implementation, device)
    check_writable(Path(output))
    chosen = choose_tasks(tasks, split)
    read_through(chosen)
    found = find_model(source, revision)
    encoder = load_encoder(
        source, found, dtype, attn_implementation, max_seq_length, device, trust_remote_code=trust_remote_code
    )
    return evaluate_encoder(encoder, model_names([source])[0], chosen, Path(output), batch_size)


def evaluate_encoder(
    encoder: PromptedEncoder,
    name: str,
    tasks: Sequence[AbsTask],
    output: Path,
    batch_size: int,
    *,
    by_query: bool = False,
) -> Evaluated:
    """Evaluate a model that is loaded on tasks that are checked; results that are kept are taken from there.

    Args:
        encoder, output, batch_size: see ``evaluate``.
        name: what the model is called in the table.
        tasks: the tasks, whose names are different.
        by_query: whether results are computed anew whose scores by query are needed and not kept.
    """
    check_tasks(type(encoder.model), tasks)
    if not any(encoder.model.prompts.values()):
        logger.warning("%s has no prompts saved: all texts are encoded without.", name)
    output.mkdir(parents=True, exist_ok=True)
    cache = mteb.ResultCache(output)
    folder = cache.get_task_result_path("results", encoder.mteb_model_meta).parent
    results = []
    for task in tasks:
        measure = measure_of(task)
        kept = cache.load_task_result(task.metadata.name, encoder.mteb_model_meta)
        # NOTE: mteb compares the data's revision only where a split is missing.
        anew = kept is not None and (
            kept.dataset_revision != task.metadata.revision
            or (by_query and measure and kept_query_scores(folder, task, kept) is None)
        )
        reseed(task)
        with (
            named_if_offline(task, f" The results of other tasks are kept in {output}."),
            tempfile.TemporaryDirectory(dir=output, prefix=".") as temporary,  # of what was retrieved: it may be large
        ):
            results += mteb.evaluate(
                encoder,
                task,
                cache=cache,
                overwrite_strategy="always" if anew else "only-missing",
                encode_kwargs={"batch_size": batch_size},
                prediction_folder=Path(temporary) if measure else None,
            ).task_results
            predictions = Path(temporary, task.prediction_file_name)
            if measure and predictions.is_file():
                keep_query_scores(folder, task, score_queries(task, measure, predictions))
        counted = encoder.index.pop(task.metadata.name, None)
        if counted is not None and not isinstance(encoder.model, SentenceTransformer):
            with written_beside(_index_file(folder, task)) as staged:
                write_json(staged, counted)
    table = _table(name, results, tasks, encoder, folder)
    (folder / "results.md").write_text(table, encoding="utf-8")
    return Evaluated(results, [encoder.main_prompt(task) for task in tasks], table, folder)


def _index_file(folder: Path, task: AbsTask) -> Path:
    return folder / "index" / f"{task.metadata.name}.json"  # not in mteb's folder, of which it takes every file


def reseed(task: AbsTask) -> None:
    """Let a task sample what it sampled when it was new: an evaluation moves its random state on."""
    for own in task.tasks if isinstance(task, AbsTaskAggregate) else [task]:
        own.rng_state, own.np_rng = random.Random(own.seed), np.random.default_rng(own.seed)


@contextmanager
def named_if_offline(task: AbsTask, kept: str = "") -> Iterator[None]:
    """Name the task whose data cannot be had from the Hub, and say what is ``kept``."""
    try:
        yield
    except OFFLINE as error:
        raise ConnectionError(
            f"The data of {task.metadata.name} are on the Hub ({task.metadata.dataset['path']}), which cannot be "
            f"reached: {error} Fix: evaluate on folders, or download them where there is a network.{kept}"
        ) from error


def choose_tasks(names: Sequence[str | Path], split: str = "test") -> list[AbsTask]:
    """``find_tasks``, at least one, of which no two have one name."""
    tasks = find_tasks(names, split)
    found = [task.metadata.name for task in tasks]
    if repeated := sorted({name for name in found if found.count(name) > 1}):
        raise ValueError(
            f"The tasks {repeated} are named twice, and results are kept by name. Fix: rename one of the folders, or "
            "evaluate on it in a run of its own."
        )
    if not tasks:
        raise ValueError("There are no tasks to evaluate on. Name tasks of mteb, or folders.")
    return tasks


def read_through(tasks: Iterable[AbsTask]) -> None:
    """Say what is wrong with the files of local tasks now, not after the tasks before them."""
    for task in tasks:
        if isinstance(task, LocalTask):
            task.load_data()
            task.unload_data()


def find_tasks(names: Iterable[str | Path], split: str = "test") -> list[AbsTask]:
    """The tasks of folders, and mteb's tasks, or all tasks of its benchmarks, of these names."""
    tasks: list[AbsTask] = []
    single_tasks: list[str] = []  # asked for once, if at all: mteb makes all of its tasks to list them
    benchmarks: list[str] = []
    for name in names:
        if Path(name).is_dir():
            tasks.append(local_task(name, split))
            continue
        single_tasks = single_tasks or [task.metadata.name for task in mteb.get_tasks()]
        benchmarks = benchmarks or [benchmark.name for benchmark in mteb.get_benchmarks()]
        if name in single_tasks:
            tasks.append(mteb.get_task(str(name)))
        elif name in benchmarks:
            tasks += mteb.get_benchmark(str(name)).tasks
        else:
            near = ", ".join(get_close_matches(str(name), [*single_tasks, *benchmarks], n=5, cutoff=0.4))
            raise ValueError(
                f"{name} is neither a folder nor a task or benchmark of mteb {mteb.__version__}. Near it: {near}."
            )
    return tasks


def find_model(source: str | Path, revision: str | None = None) -> tuple[Path, str]:
    """The folder of a model, and its revision: the commit, or a hash of its files, but for its card, what a trainer
    left, and the ranges by which its vectors may be kept."""
    root = fetch(source, revision)
    if not Path(source).is_dir():
        return root, root.name
    files = [file for file in sorted(root.rglob("*")) if file.is_file() and not left_by_trainer(file)]
    return root, hash_files(root, [file for file in files if file.name not in ("README.md", RANGES)])


def check_settings(
    batch_size: int,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    device: str | None = None,
) -> None:
    """Check what can be known of the settings of ``evaluate`` without a model.

    Raises:
        ValueError: naming the value and the valid ones.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more.")
    precision = getattr(torch, dtype or "float32", None)
    if dtype != "auto" and not (isinstance(precision, torch.dtype) and precision.is_floating_point):
        raise ValueError(f"dtype={dtype!r} is no precision. Valid ones: float32, bfloat16, float16, auto.")
    attentions = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if attn_implementation and attn_implementation not in attentions and "/" not in attn_implementation:
        valid = ", ".join(attentions)
        raise ValueError(f"attn_implementation={attn_implementation!r} is no attention. Valid ones: {valid}.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # of a device that is none, or is not there
        raise ValueError(f"device={device!r} cannot be used: {error}") from error


def load_encoder(
    source: str | Path,
    found: tuple[Path, str],
    dtype: str | None = None,
    attn_implementation: str | None = None,
    max_seq_length: int | None = None,
    device: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> PromptedEncoder:
    """Load a model that ``find_model`` found, as mteb calls it."""
    root, commit = found
    model = load_model(root, dtype, attn_implementation, max_seq_length, device, trust_remote_code)
    settings = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": attention_of(model),
        "max_seq_length": model.max_seq_length,
    }
    # By the name of its folder alone, so that one that was moved finds its results.
    kept_as = Path(source).resolve().name if Path(source).is_dir() else str(source)
    return PromptedEncoder(model, kept_as, commit, settings)


def load_model(
    root: Path,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    max_seq_length: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> BaseModel:
    """Load a folder; its code runs if this package ships it, or if told to.

    Raises:
        ValueError: for unknown code, or texts longer than the model takes.
    """
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    model_kwargs = {key: value for key, value in options.items() if value}
    model = load_any(root, trust_remote_code, device=device, model_kwargs=model_kwargs)
    if max_seq_length is not None:
        llm = model.transformers_model
        config = None if llm is None else llm.config.get_text_config()
        check_length(max_seq_length, getattr(config, "max_position_embeddings", None))
        model.max_seq_length = max_seq_length
    return model


def check_length(max_seq_length: int, positions: int | None) -> None:
    """Raise ValueError for texts longer than an LLM with so many positions takes; None if it does not say."""
    if max_seq_length < 1 or (positions and max_seq_length > positions):
        valid = f"from 1 to {positions}, the LLM's positions" if positions else "1 or more"
        raise ValueError(f"max_seq_length={max_seq_length} must be {valid}.")


def attention_of(model: BaseModel) -> str:
    """The attention implementation of a model's transformer; ``none`` of a model without one."""
    llm = model.transformers_model
    return "none" if llm is None else llm.config._attn_implementation


def _table(
    name: str, results: Sequence[TaskResult], tasks: Sequence[AbsTask], encoder: PromptedEncoder, folder: Path
) -> str:
    """The main score of every task, and the mean of each kind of task; of vectors without a fixed size, the bytes of a
    document too."""
    meta = encoder.mteb_model_meta
    settings = meta.experiment_kwargs
    longest = settings["max_seq_length"]
    lines = [
        f"{name} ({meta.revision}), {settings['dtype']}, {settings['attn_implementation']} attention, texts of "
        f"{f'at most {longest}' if longest else 'any number of'} tokens; st-llm-embed {__version__}, "
        f"mteb {mteb.__version__}.",
        "",
        "| task | kind | figure | score | prompt |",
        "| --- | --- | --- | --- | --- |",
    ]
    sizes_differ = not isinstance(encoder.model, SentenceTransformer)
    if sizes_differ:
        lines[-2:] = [f"{lines[-2]} bytes a document |", f"{lines[-1]} ---: |"]
    scores: dict[str, list[float]] = {}
    for result, task in zip(results, tasks, strict=True):
        score = result.get_score()
        scores.setdefault(task.metadata.type, []).append(score)
        prompt = encoder.main_prompt(task)
        shown = f"`{prompt}`".replace("\n", "\\n").replace("|", "\\|") if prompt else "none"
        cells = [task.metadata.name, task.metadata.type, task.metadata.main_score, f"{score:.4f}", shown]
        if sizes_differ:
            counted = read_json(file) if (file := _index_file(folder, task)).is_file() else None
            cells.append(f"{counted['bytes'] / counted['documents']:,.0f}" if counted else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| kind | tasks | mean |", "| --- | --- | --- |"]
    lines += [f"| {kind} | {len(values)} | {sum(values) / len(values):.4f} |" for kind, values in scores.items()]
    return "\n".join(lines) + "\n"
