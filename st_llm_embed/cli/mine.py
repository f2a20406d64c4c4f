"""Add hard negatives to a data set.

Let a teacher model rank a corpus for every anchor, and take the hardest texts that score well below its positive,
and that a judge, if there is one, does not hold for relevant either.
Writes train.jsonl, report.json and histogram.png; and dropped.jsonl, the rows with too few negatives and why.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from st_llm_embed.cli.shared import (
    MODEL,
    NEW_FOLDER,
    ROWS,
    add_columns,
    add_tokens_per_batch,
    add_trust,
    shows_progress,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help=f"the rows: {ROWS}, with the columns anchor and positive")
    parser.add_argument("teacher", help=MODEL)
    add_columns(parser, "--columns", "the rows, such as anchor=question positive=answer")
    parser.add_argument("--output", type=Path, required=True, help=NEW_FOLDER)
    parser.add_argument(
        "--corpus",
        help=f"the documents to search besides the positives: {ROWS}, or a folder in BEIR's layout, with the column "
        "text, and title if there is one (both are one document)",
    )
    add_columns(parser, "--corpus-columns", "the corpus, such as text=body title=headline")
    parser.add_argument(
        "--num-negatives", type=int, default=7, help="the number of negatives of each row (default: %(default)s)"
    )
    parser.add_argument(
        "--relative-margin",
        type=_margin,
        default=0.05,
        help="the share of the positive's score by which a negative must score lower, or none (default: %(default)s)",
    )
    parser.add_argument(
        "--absolute-margin",
        type=_margin,
        help="the difference of cosines by which a negative must score lower, too, or none (default: none)",
    )
    parser.add_argument(
        "--range-min",
        type=int,
        default=0,
        help="the number of hardest candidates to skip, as positives that nobody marked (default: %(default)s)",
    )
    parser.add_argument(
        "--range-max", type=int, default=100, help="the number of candidates of each anchor (default: %(default)s)"
    )
    parser.add_argument(
        "--judge",
        help="a second opinion on the candidates: the folder or Hub id of a cross-encoder or of an embedding model, "
        "bm25, or an LLM on an OpenAI-compatible server, such as http://localhost:8000/v1#Qwen/Qwen3-8B, whose key is "
        "in the environment, as OPENAI_API_KEY; its scores become a column",
    )
    parser.add_argument(
        "--judged",
        choices=("drop", "promote"),
        default="drop",
        help="what a candidate becomes that the judge holds for relevant: no negative, or a further positive of its "
        "anchor, in a row of its own (default: %(default)s)",
    )
    parser.add_argument(
        "--judge-relative-margin",
        type=float,
        help="the share of the positive's score, by the judge, by which a candidate's must be lower not to be held "
        "for relevant (default: 0.5 of probabilities, 0.2 of cosines, 0.5 of BM25)",
    )
    parser.add_argument(
        "--judge-absolute-margin",
        type=float,
        help="the difference by which it must be lower (default: 3 of logits)",
    )
    parser.add_argument("--query-prompt", help="the prompt of the anchors (default: the teacher's own)")
    parser.add_argument("--corpus-prompt", help="the prompt of the documents (default: the teacher's own)")
    add_tokens_per_batch(parser)
    parser.add_argument(
        "--use-faiss",
        choices=("exact", "approximate"),
        help="search with FAISS, on the CPU; approximate is for corpora of more than a few million texts, and misses "
        "some candidates: how many is reported (default: search with torch, exactly)",
    )
    parser.add_argument(
        "--cache-folder",
        help="the folder that keeps the vectors and what was found: an interrupted run goes on, another starts ahead, "
        "and several at once share the work",
    )
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    from st_llm_embed.data import load_corpus, load_rows
    from st_llm_embed.files import check_empty
    from st_llm_embed.mining import load_judge, load_teacher, mine_negatives

    try:
        from st_llm_embed.mining.histogram import write_mined
    except ModuleNotFoundError as error:
        raise ImportError(f"The picture needs {error.name!r}. Fix: pip install 'st-llm-embed[plots]'.") from error

    check_empty(arguments.output.resolve())
    progress = shows_progress()
    sources = {key: getattr(arguments, key) for key in ("data", "teacher", "corpus", "judge")}
    not_settings = {*sources, "columns", "corpus_columns", "output", "trust_remote_code", "run", "debug"}
    settings = {key: value for key, value in vars(arguments).items() if key not in not_settings}
    mined = mine_negatives(
        load_rows(arguments.data, columns=dict(arguments.columns)),
        load_teacher(arguments.teacher, arguments.trust_remote_code),
        load_corpus(arguments.corpus, dict(arguments.corpus_columns)) if arguments.corpus else None,
        judge=load_judge(arguments.judge, arguments.trust_remote_code) if arguments.judge else None,
        **settings,
        show_progress_bar=progress,
    )
    written = write_mined(mined, arguments.output, {**sources, **settings})
    report = mined.report
    print(f"Wrote {report.rows - report.rows_dropped} of {report.rows} rows to {written}.")
    if report.rows_dropped:
        print(f"Dropped {report.rows_dropped} with too few negatives: {written.with_name('dropped.jsonl')} says why.")
    print(f"Of {report.candidates} candidates were dropped, by rule: {report.dropped}.")
    if report.judged is not None:
        print(
            f"The judge was asked about {report.judged['pairs']} pairs, and holds {report.judged['relevant']} "
            f"candidates for relevant; {report.judged['promoted']} of them became positives, in rows after the others."
        )
    if report.recall is not None:
        print(f"The approximate search found {report.recall:.1%} of the candidates of an exact one, by a sample.")


def _margin(text: str) -> float | None:
    return None if text == "none" else float(text)
