"""Encode a corpus.

Write the vectors of all texts into a folder, in shards with the rows' ids, or of a small corpus into one .npy file.
The same command, run by any number of processes on machines that see the folder, shares the work; run again, it goes
on where it was.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from st_llm_embed.cli.shared import MODEL, ROWS, add_columns, add_tokens_per_batch, add_trust, shows_progress

if TYPE_CHECKING:
    from datasets import Dataset

    from st_llm_embed.encoding import TextEncoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    parser.add_argument(
        "texts",
        help=f"the texts: {ROWS}, .txt files, or the corpus of a folder in BEIR's layout, with the columns text and "
        "perhaps title and id",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="the folder of the shards, or a .npy file (texts, dim) to write"
    )
    add_columns(parser, "--columns", "the texts, such as text=body id=url")
    parser.add_argument(
        "--side",
        choices=("document", "query", "text"),
        default="document",
        help="whether the texts are documents, queries or of one sort, which says the prompt (default: %(default)s)",
    )
    parser.add_argument("--prompt-name", help="the name of another of the model's prompts")
    parser.add_argument(
        "--precision",
        choices=("float32", "float16", "int8", "binary"),
        default="float32",
        help="how the vectors are kept (default: %(default)s)",
    )
    parser.add_argument(
        "--ranges",
        type=Path,
        help="the file int8_ranges.json, or the model's folder with it, of --precision int8 (default: the "
        "ranges of the first 1,000 texts)",
    )
    parser.add_argument(
        "--format", choices=("npy", "parquet"), default="npy", help="the format of the shards (default: %(default)s)"
    )
    parser.add_argument(
        "--shard-size", type=int, default=10_000, help="the number of texts in a shard (default: %(default)s)"
    )
    parser.add_argument("--streaming", action="store_true", help="read the texts as they come; they need no disk")
    add_tokens_per_batch(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="the precision that the model computes in (default: that it was saved in)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the model with torch.compile, which takes minutes"
    )
    parser.add_argument(
        "--url",
        help="an OpenAI-compatible server that has the model, such as http://localhost:8000/v1; MODEL says what it "
        "must answer, by its reference.json; the key that it wants is in the environment, as OPENAI_API_KEY",
    )
    parser.add_argument("--served-name", help="the name of the model on the server (default: MODEL)")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    from st_llm_embed.data import load_corpus
    from st_llm_embed.encoding import CorpusEncoding
    from st_llm_embed.files import check_file_writable

    to_file = arguments.output.suffix == ".npy"
    if to_file:
        if arguments.output.is_dir():
            raise ValueError(f"--output {arguments.output} is a folder. Name a file, such as vectors.npy, or another.")
        if arguments.precision != "float32" or arguments.format != "npy" or arguments.streaming or arguments.ranges:
            raise ValueError(
                "--precision, --ranges, --format and --streaming are of a folder of shards, and --output is a file. "
                "Name a folder."
            )
        check_file_writable(arguments.output)
    elif arguments.output.is_file() or arguments.output.suffix[1:].isalpha():
        raise ValueError(
            f"--output {arguments.output} is no .npy file, and no name of a folder. Name one of them, such as vectors."
        )
    corpus = load_corpus(arguments.texts, dict(arguments.columns), streaming=arguments.streaming)
    encoder = _encoder(arguments)
    if to_file:
        _write_array(arguments.output, encoder, corpus)
        return
    report = CorpusEncoding(
        encoder,
        corpus,
        arguments.output,
        shard_size=arguments.shard_size,
        precision=arguments.precision,
        file_format=arguments.format,
        source=arguments.texts,
        ranges=arguments.ranges,
        show_progress_bar=True,
    ).run()
    print(
        f"{arguments.output} has {report.texts:,} texts in {report.shards:,} shards: {report.tokens:,} tokens, "
        f"{report.cut:,} texts cut, {report.empty:,} empty, {report.duplicates:,} duplicates."
    )


def _encoder(arguments: argparse.Namespace) -> TextEncoder:
    """The model on this process's device, or the server's."""
    import torch

    from st_llm_embed.encoding import ModelEncoder, ServerEncoder
    from st_llm_embed.trust import load_trusted

    if arguments.url is not None:
        here = {
            "--dtype": arguments.dtype,
            "--compile": arguments.compile or None,
            "--tokens-per-batch": arguments.tokens_per_batch,
        }
        if given := [flag for flag, value in here.items() if value is not None]:
            raise ValueError(f"{', '.join(given)} is of a model that computes here, and --url names a server.")
        return ServerEncoder(
            arguments.url,
            arguments.model,
            served_name=arguments.served_name,
            side=arguments.side,
            prompt_name=arguments.prompt_name,
        )
    if arguments.served_name is not None:
        raise ValueError("--served-name is of a server, and there is no --url.")
    place = {}
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:  # of torchrun and accelerate launch
        place["device"] = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    kwargs = {"model_kwargs": {"dtype": getattr(torch, arguments.dtype)}} if arguments.dtype else {}
    model = load_trusted(arguments.model, arguments.trust_remote_code, **place, **kwargs)
    prompt = None
    if arguments.prompt_name is not None:
        if arguments.prompt_name not in model.prompts:
            raise ValueError(
                f"--prompt-name {arguments.prompt_name} is unknown. The model has: {', '.join(model.prompts)}."
            )
        prompt = model.prompts[arguments.prompt_name]
    if arguments.compile:
        model.compile(dynamic=True)
    return ModelEncoder(model, arguments.side, prompt, arguments.tokens_per_batch, name=arguments.model)


def _write_array(file: Path, encoder: TextEncoder, corpus: Dataset) -> None:
    """All vectors as one array, in the order of the rows."""
    from tqdm.auto import tqdm

    from st_llm_embed.data.corpus import read_corpus
    from st_llm_embed.encoding.cache import check_finite
    from st_llm_embed.files import write_array, written_beside

    texts = list(read_corpus(corpus)["text"])
    with tqdm(total=len(texts), desc="Encoding", unit="text", disable=not shows_progress()) as bar:
        vectors = check_finite(encoder.encode(texts, bar.update), texts)
    with written_beside(file.resolve()) as staged:
        write_array(staged, vectors)
    print(f"Wrote {len(vectors):,} embeddings of {vectors.shape[1]} numbers to {file}.")
