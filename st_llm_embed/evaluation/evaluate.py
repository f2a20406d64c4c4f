"""One call evaluates a model on mteb's tasks and local ones, under its saved prompts.

Results are mteb's own files, kept by the model's revision, its precision and its attention: what is there already for
the data as they are is not computed again, so an interrupted evaluation goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import mteb
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from mteb.abstasks import AbsTask
from mteb.results import TaskResult
from sentence_transformers import SentenceTransformer

from st_llm_embed.evaluation.encoder import PromptedEncoder
from st_llm_embed.evaluation.local_tasks import LocalTask, local_task
from st_llm_embed.files import check_writable, hash_files
from st_llm_embed.trust import fetch, left_by_trainer, load_trusted
from st_llm_embed.version import __version__

logger = logging.getLogger(__name__)
OFFLINE = (ConnectionError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)


@dataclass(frozen=True)
class Evaluated:
    """What ``evaluate`` gives.

    Args:
        results: the results of each task, as mteb has them.
        table: the main scores as a table in Markdown.
        folder: the folder in which both are.
    """

    results: list[TaskResult]
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
            or a judgement is expected, unknown code in the model, or texts longer than it takes.
        ConnectionError: for a task whose data are on the Hub, while it cannot be reached.
    """
    check_writable(Path(output))
    chosen = find_tasks(tasks, split)
    names = [task.metadata.name for task in chosen]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"The tasks {repeated} are named twice, and results are kept by name. Fix: rename one of the folders, or "
            "evaluate on it in a run of its own."
        )
    for task in chosen:
        if isinstance(task, LocalTask):  # what is wrong with its files is said now, not after the tasks before it
            task.load_data()
            task.unload_data()
    root, commit = find_model(source, revision)
    model = load_model(root, dtype, attn_implementation, max_seq_length, device, trust_remote_code)
    name = Path(source).resolve().name if Path(source).is_dir() else str(source)
    settings = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": attention_of(model),
        "max_seq_length": model.max_seq_length,
    }
    encoder = PromptedEncoder(model, name, commit, settings)
    if not any(model.prompts.values()):
        logger.warning("%s has no prompts saved: all texts are encoded without.", source)
    cache = mteb.ResultCache(output)
    results = []
    for task in chosen:
        try:
            results += mteb.evaluate(
                encoder,
                task,
                cache=cache,
                overwrite_strategy="always" if _is_stale(task, encoder, cache) else "only-missing",
                encode_kwargs={"batch_size": batch_size},
            ).task_results
        except OFFLINE as error:
            raise ConnectionError(
                f"The data of {task.metadata.name} are on the Hub ({task.metadata.dataset['path']}), which cannot be "
                f"reached: {error} Fix: evaluate on folders, or download them where there is a network. The results "
                f"of other tasks are kept in {output}."
            ) from error
    folder = cache.get_task_result_path("results", encoder.mteb_model_meta).parent
    table = _table(results, chosen, encoder)
    (folder / "results.md").write_text(table, encoding="utf-8")
    return Evaluated(results, table, folder)


def _is_stale(task: AbsTask, encoder: PromptedEncoder, cache: mteb.ResultCache) -> bool:
    """Are the task's results in ``cache`` those of other data?

    NOTE: mteb compares the data's revision only where a split is missing.
    """
    result = cache.load_task_result(task.metadata.name, encoder.mteb_model_meta)
    return result is not None and result.dataset_revision != task.metadata.revision


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
    """The folder of a model, and its revision: the commit, or a hash of its files, but for its card and what a trainer
    left."""
    root = fetch(source, revision)
    if not Path(source).is_dir():
        return root, root.name
    files = [file for file in sorted(root.rglob("*")) if file.is_file() and not left_by_trainer(file)]
    return root, hash_files(root, [file for file in files if file.name != "README.md"])


def load_model(
    root: Path,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    max_seq_length: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> SentenceTransformer:
    """Load a folder; its code runs if this package ships it, or if told to.

    Raises:
        ValueError: for unknown code, or texts longer than the model takes.
    """
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    model_kwargs = {key: value for key, value in options.items() if value}
    model = load_trusted(root, trust_remote_code, device=device, model_kwargs=model_kwargs)
    if max_seq_length is not None:
        llm = model.transformers_model
        positions = None if llm is None else getattr(llm.config.get_text_config(), "max_position_embeddings", None)
        if max_seq_length < 1 or (positions and max_seq_length > positions):
            valid = f"from 1 to {positions}, the LLM's positions" if positions else "1 or more"
            raise ValueError(f"max_seq_length={max_seq_length} must be {valid}.")
        model.max_seq_length = max_seq_length
    return model


def attention_of(model: SentenceTransformer) -> str:
    """The attention implementation of a model's transformer; ``none`` of a model without one."""
    llm = model.transformers_model
    return "none" if llm is None else llm.config._attn_implementation


def _table(results: Sequence[TaskResult], tasks: Sequence[AbsTask], encoder: PromptedEncoder) -> str:
    """The main score of every task, and the mean of each kind of task."""
    meta = encoder.mteb_model_meta
    settings = meta.experiment_kwargs
    longest = settings["max_seq_length"]
    lines = [
        f"{meta.name} ({meta.revision}), {settings['dtype']}, {settings['attn_implementation']} attention, texts of "
        f"{f'at most {longest}' if longest else 'any number of'} tokens; st-llm-embed {__version__}, "
        f"mteb {mteb.__version__}.",
        "",
        "| task | kind | figure | score | prompt |",
        "| --- | --- | --- | --- | --- |",
    ]
    scores: dict[str, list[float]] = {}
    for result, task in zip(results, tasks, strict=True):
        score = result.get_score()
        scores.setdefault(task.metadata.type, []).append(score)
        prompt = encoder.main_prompt(task)
        shown = f"`{prompt}`".replace("\n", "\\n").replace("|", "\\|") if prompt else "none"
        cells = [task.metadata.name, task.metadata.type, task.metadata.main_score, f"{score:.4f}", shown]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| kind | tasks | mean |", "| --- | --- | --- |"]
    lines += [f"| {kind} | {len(values)} | {sum(values) / len(values):.4f} |" for kind, values in scores.items()]
    return "\n".join(lines) + "\n"
