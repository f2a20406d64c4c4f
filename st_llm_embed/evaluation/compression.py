"""What a model's vectors are still worth when they are cut to fewer dimensions and kept in fewer bits.

The model encodes every text once. Each width and precision is then a model of its own to mteb, whose results are kept
as others are; one table has their means, what share of the whole vectors' figure that is, and the bytes of a vector.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mteb
import numpy as np
from mteb.abstasks import AbsTask, AbsTaskRetrieval
from mteb.results import TaskResult
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize

from st_llm_embed.encoding.encoder import ModelEncoder
from st_llm_embed.encoding.manifest import space_of
from st_llm_embed.encoding.ranges import RANGES, range_of, ranges_of, read_ranges, write_ranges
from st_llm_embed.evaluation.compressed_encoder import (
    PRECISIONS,
    RESCORED,
    CompressedEncoder,
    KeptEncoder,
    bytes_of,
    cut,
)
from st_llm_embed.evaluation.encoder import PromptedEncoder
from st_llm_embed.evaluation.evaluate import (
    check_settings,
    choose_tasks,
    evaluate_encoder,
    find_model,
    load_encoder,
    read_through,
)
from st_llm_embed.evaluation.model_names import model_names
from st_llm_embed.files import check_writable
from st_llm_embed.hub.card import put_section

SAMPLE = 1_000  # documents of each retrieval task: the ranges of int8
HEADING = "## Shorter vectors"


class Form(NamedTuple):
    """How vectors are kept.

    Args:
        width: how many of the first dimensions.
        precision: how each of them, a key of ``PRECISIONS``.
    """

    width: int
    precision: str


@dataclass(frozen=True)
class Compressed:
    """What ``evaluate_compressed`` gives.

    Args:
        results: the results of each task, as mteb has them, by how the vectors are kept; the whole ones first.
        table: the figures as a section of Markdown.
        folder: the folder of the results of the whole vectors, in which the table is, ``compressed.md``.
        ranges: the file of the ranges of int8, if there are any.
    """

    results: dict[Form, list[TaskResult]]
    table: str
    folder: Path
    ranges: Path | None


def evaluate_compressed(
    source: str | Path,
    tasks: Sequence[str | Path],
    output: str | Path,
    *,
    dims: Sequence[int] = (),
    precision: Sequence[str] = ("float32",),
    split: str = "test",
    batch_size: int = 32,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    max_seq_length: int | None = None,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Compressed:
    """Evaluate a model's vectors as they are, and in every width and precision.

    The ranges of int8 are those beside the model, ``int8_ranges.json``; where there are none, of the first
    1,000 documents of every retrieval task, and are written beside the results.

    Args:
        dims: the numbers of first dimensions to keep. Default: all of them.
        precision: how each is kept: ``float32``, ``float16``, ``int8``, ``binary``, ``ubinary``.
        source, tasks, output, split, batch_size, dtype, attn_implementation, max_seq_length, device, revision,
            trust_remote_code: see ``evaluate``.

    Raises:
        ValueError: for a precision that is unknown, more dimensions than the model has, a model that does not compare
            by cosine, int8 without ranges and without a retrieval task, ranges of another model, or as ``evaluate``
            does.
        FileNotFoundError, OSError, ConnectionError: as ``evaluate`` does.
    """
    check_settings(batch_size, dtype, attn_implementation, device)
    check_forms(dims, precision)
    check_writable(Path(output))
    chosen = choose_tasks(tasks, split)
    read_through(chosen)
    root, commit = find_model(source, revision)
    own_ranges = root / RANGES if (root / RANGES).is_file() else None
    if "int8" in precision and own_ranges is None and not any(isinstance(task, AbsTaskRetrieval) for task in chosen):
        raise ValueError(
            f"precision='int8' needs each dimension's range in a sample of documents, and none of the tasks has any. "
            f"Add a retrieval task, or put {RANGES} of an evaluation beside the model."
        )
    encoder = load_encoder(
        source, (root, commit), dtype, attn_implementation, max_seq_length, device, trust_remote_code=trust_remote_code
    )
    whole = _whole(encoder)
    forms = [Form(width, kind) for kind in dict.fromkeys(precision) for width in dict.fromkeys(dims or (whole.width,))]
    _check_model(encoder, whole, forms)
    name = model_names([source])[0]
    Path(output).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".") as folder:
        kept = KeptEncoder(encoder, Path(folder), SAMPLE)
        first = evaluate_encoder(kept, name, chosen, Path(output), batch_size)
        results = {whole: first.results}
        ranges, file = _ranges(kept, chosen, forms, own_ranges, first.folder, batch_size)
        for form in forms:
            if form not in results:
                own = ranges[form.width] if form.precision == "int8" else None
                compressed = CompressedEncoder(kept, *form, own)
                results[form] = evaluate_encoder(compressed, name, chosen, Path(output), batch_size).results
    table = _table(encoder, first.table.splitlines()[0], chosen, results, file)
    (first.folder / "compressed.md").write_text(table, encoding="utf-8")
    return Compressed(results, table, first.folder, file)


def keep_with_model(compressed: Compressed, folder: Path) -> None:
    """Put the table into a model's card, and the ranges of int8 beside its weights."""
    put_section(folder / "README.md", compressed.table)
    if compressed.ranges is not None and compressed.ranges.parent.resolve() != folder.resolve():
        shutil.copy(compressed.ranges, folder)


def check_forms(dims: Sequence[int], precision: Sequence[str]) -> None:
    """Check what can be known of widths and precisions without a model.

    Raises:
        ValueError: naming the value and the valid ones.
    """
    if not precision:
        raise ValueError(f"precision is empty. Valid values: {', '.join(PRECISIONS)}.")
    if unknown := [kind for kind in precision if kind not in PRECISIONS]:
        raise ValueError(f"precision={unknown[0]!r} is unknown. Valid values: {', '.join(PRECISIONS)}.")
    if wrong := [width for width in dims if width < 1]:
        raise ValueError(f"dims={wrong[0]} must be 1 or more.")


def _whole(encoder: PromptedEncoder) -> Form:
    width = encoder.model.get_embedding_dimension()
    return Form(width or len(encoder.model.encode("a")), "float32")


def _check_model(encoder: PromptedEncoder, whole: Form, forms: Sequence[Form]) -> None:
    if not isinstance(encoder.model, SentenceTransformer):
        raise ValueError(
            f"dims and precision are of one dense vector, and the model is a {type(encoder.model).__name__}."
            " Leave them out: its figures and the bytes of a document are those of evaluate."
        )
    if wide := [form.width for form in forms if form.width > whole.width]:
        raise ValueError(f"dims={wide[0]} must be from 1 to {whole.width}, the model's dimensions.")
    normalizes = any(isinstance(module, Normalize) for module in encoder.model)
    if encoder.model.similarity_fn_name != "cosine" and not normalizes:
        raise ValueError(
            f"The model compares by similarity_fn_name={encoder.model.similarity_fn_name!r}, and vectors that are cut "
            "are compared by 'cosine', for which it was not made."
        )


def _ranges(
    kept: KeptEncoder,
    tasks: Sequence[AbsTask],
    forms: Sequence[Form],
    own: Path | None,
    folder: Path,
    batch_size: int,
) -> tuple[dict[int, np.ndarray], Path | None]:
    """The ranges of int8 by width, and their file."""
    widths = [form.width for form in forms if form.precision == "int8"]
    if not widths:
        return {}, None
    space = space_of(ModelEncoder(kept.model))
    if own is not None:
        return {width: range_of(own, width, space) for width in widths}, own
    earlier = folder / RANGES
    if earlier.is_file() and set(widths) <= (found := read_ranges(earlier, space)).keys():
        return found, earlier
    with_documents = [task for task in tasks if isinstance(task, AbsTaskRetrieval)]
    for task in with_documents:
        if task.metadata.name not in kept.sampled:  # its result was there
            mteb.evaluate(kept, task, cache=None, encode_kwargs={"batch_size": batch_size})
    sample = np.concatenate([kept.sampled[task.metadata.name] for task in with_documents])
    ranges = {width: ranges_of(cut(sample, width)) for width in widths}
    return ranges, write_ranges(folder, ranges, space, len(sample))


def _table(
    encoder: PromptedEncoder,
    about: str,
    tasks: Sequence[AbsTask],
    results: dict[Form, list[TaskResult]],
    ranges: Path | None,
) -> str:
    """The means by kind of task, and all figures."""
    whole, *_ = results
    kinds = list(dict.fromkeys(task.metadata.type for task in tasks))
    means = {
        form: {
            kind: float(np.mean([r.get_score() for r, t in zip(own, tasks, strict=True) if t.metadata.type == kind]))
            for kind in kinds
        }
        for form, own in results.items()
    }
    counts = {kind: sum(task.metadata.type == kind for task in tasks) for kind in kinds}
    llm = encoder.model.transformers_model
    trained = getattr(getattr(llm, "config", None), "matryoshka_dimensions", None)
    lines = [
        HEADING,
        "",
        f"{about} Trained for {', '.join(map(str, trained))} dimensions."
        if trained
        else f"{about} Its config.json names no fewer dimensions that it was trained for.",
        "",
        f"| dimensions | precision | bytes | {' | '.join(f'{kind} ({counts[kind]}) | kept' for kind in kinds)} |",
        "|" + " ---: | --- | ---: |" + " ---: |" * 2 * len(kinds),
    ]
    for form, own in means.items():
        cells = [str(form.width), form.precision, f"{bytes_of(*form):,}"]
        for kind in kinds:
            share = f"{own[kind] / means[whole][kind]:.1%}" if means[whole][kind] > 0 else "-"
            cells += [f"{own[kind]:.4f}", share]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Vectors that are cut are brought to length 1 again. Queries keep all bits."]
    if any(form.precision.endswith("binary") for form in results):
        lines.append(f"By their signs the {RESCORED} best documents are found, and ranked by the query's own numbers.")
    if ranges is not None:
        lines.append(f"The ranges of int8 are in `{RANGES}`, by the number of dimensions.")
    shown = [f"{form.width} {form.precision}" for form in results]
    lines += ["", f"| task | figure | {' | '.join(shown)} |", "| --- | --- |" + " ---: |" * len(shown)]
    for place, task in enumerate(tasks):
        scores = " | ".join(f"{own[place].get_score():.4f}" for own in results.values())
        lines.append(f"| {task.metadata.name} | {task.metadata.main_score} | {scores} |")
    return "\n".join(lines) + "\n"
