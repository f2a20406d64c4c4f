"""Project a model into the space of another, so that both search one index.

Fit a Dense layer in closed form to the teacher's vectors of some texts: minutes, and no step of training. The
student's queries then search what the teacher has encoded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from st_llm_embed.cli.shared import (
    MODEL,
    NEW_FOLDER,
    ROWS,
    add_card,
    add_columns,
    add_tokens_per_batch,
    add_trust,
    shows_progress,
)

SECTION = """A linear projection, fitted by ridge regression and not trained, takes this model there. The mean cosine
with the teacher's vectors is {cosine:.3f} on {held_out:,} texts held out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", help=MODEL)
    parser.add_argument("teacher", help=MODEL)
    parser.add_argument("output", help=NEW_FOLDER)
    texts = f"{ROWS}, or .txt files, with the column text"
    parser.add_argument("--queries", help=f"the texts to encode as queries: {texts}")
    add_columns(parser, "--queries-columns", "the queries, such as text=question")
    parser.add_argument("--documents", help=f"the texts to encode as documents: {texts}, or a folder in BEIR's layout")
    add_columns(parser, "--documents-columns", "the documents, such as text=body title=headline")
    parser.add_argument(
        "--cache-folder", help="the folder that keeps the teacher's vectors: an interrupted run goes on"
    )
    add_tokens_per_batch(parser)
    add_card(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    from st_llm_embed.data import load_corpus, load_rows
    from st_llm_embed.data.corpus import read_corpus
    from st_llm_embed.files import check_empty
    from st_llm_embed.hub import save_sealed
    from st_llm_embed.hub.card import state_card
    from st_llm_embed.hub.teacher import name_teacher
    from st_llm_embed.mining import load_teacher
    from st_llm_embed.teaching import align
    from st_llm_embed.trust import load_trusted

    check_empty(Path(arguments.output).resolve())
    if not (arguments.queries or arguments.documents):
        raise ValueError("There are no texts. Name --queries, --documents, or both.")
    sides = {}
    if arguments.queries:
        sides["queries"] = load_rows(arguments.queries, columns=dict(arguments.queries_columns))
    if arguments.documents:
        sides["documents"] = read_corpus(load_corpus(arguments.documents, dict(arguments.documents_columns)))
    model, alignment = align(
        load_trusted(arguments.student, arguments.trust_remote_code),
        load_teacher(arguments.teacher, arguments.trust_remote_code),
        **sides,
        tokens_per_batch=arguments.tokens_per_batch,
        cache_folder=arguments.cache_folder,
        show_progress_bar=shows_progress(),
    )
    state_card(model, arguments.name, arguments.license)
    section = SECTION.format(cosine=alignment.cosine, held_out=alignment.held_out)
    teacher = name_teacher(arguments.teacher)
    print(f"Wrote {save_sealed(model, arguments.output, section, samples=arguments.samples, teacher=teacher)}.")
    print(
        f"Of {alignment.held_out} texts held out, the mean cosine with the teacher is {alignment.cosine:.3f}; the map "
        f"was fitted on {alignment.texts} others."
    )
