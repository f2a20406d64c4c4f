"""Search a corpus with a model.

Print the documents of the highest cosine for each question. With a cache the corpus is encoded once, also where it is
larger than memory.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from functools import partial

from st_llm_embed.cli.shared import MODEL, ROWS, add_columns, add_tokens_per_batch, add_trust, shows_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    parser.add_argument(
        "corpus", help=f"the documents: {ROWS}, .txt files, or a folder in BEIR's layout, with the column text"
    )
    parser.add_argument("questions", nargs="+", help="the questions, each in quotes")
    parser.add_argument(
        "--top-k", type=int, default=5, help="the number of documents for each question (default: %(default)s)"
    )
    add_columns(parser, "--corpus-columns", "the corpus, such as text=body title=headline")
    add_tokens_per_batch(parser)
    parser.add_argument("--cache-folder", help="the folder that keeps the vectors for the next search")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    import numpy as np
    from datasets import Dataset
    from tqdm.auto import tqdm

    from st_llm_embed.data import load_corpus
    from st_llm_embed.data.corpus import read_corpus
    from st_llm_embed.encoding.cache import SHARD_SIZE, EmbeddingCache
    from st_llm_embed.mining.search import exact_search, find_nearest, shards_of
    from st_llm_embed.trust import load_trusted

    if arguments.top_k < 1:
        raise ValueError(f"--top-k {arguments.top_k} must be 1 or more.")
    corpus = read_corpus(load_corpus(arguments.corpus, dict(arguments.corpus_columns)))
    questions = Dataset.from_dict({"text": arguments.questions})
    model = load_trusted(arguments.model, arguments.trust_remote_code)
    folder, progress = arguments.cache_folder, shows_progress()
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        cache = EmbeddingCache(model, place, arguments.tokens_per_batch, SHARD_SIZE, progress)
        queries = cache.queries(questions, np.arange(len(questions)), None)
        documents = cache.documents(corpus, np.arange(len(corpus)), None)
        none = np.empty(0, np.int64)
        search = partial(exact_search, device=model.device)
        shards, k = -(-len(documents) // SHARD_SIZE), min(arguments.top_k, len(corpus))
        with tqdm(total=shards, desc="Searching", unit="shard", disable=not progress) as bar:
            parts = shards_of(documents, search, bar)
            scores, rows = find_nearest(queries.take(np.arange(len(queries))), parts, (none, none), k)
    for question, row_scores, row_numbers in zip(arguments.questions, scores, rows, strict=True):
        print(question)
        for score, text in zip(row_scores, corpus[row_numbers]["text"], strict=True):
            print(f"  {score:.3f}  {' '.join(text.split())[:200]}")
