"""Evaluate models with mteb, on its tasks or on folders.

Evaluate a model under the prompts saved in it. Results are mteb's files, kept by the model's revision, precision and
attention: an interrupted evaluation goes on. Prints a table. Of several models it has all figures, and the differences
to the first, with 95 % intervals where they can be paired over queries. With --dims or --precision it says what is
kept of one model's figures in fewer dimensions and bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from st_llm_embed.cli.shared import MODEL, add_batch_size, add_revision, add_trust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="model", help=f"{MODEL}; several are compared with the first")
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        help="the names of mteb's tasks or benchmarks, or folders: BEIR's layout, or SPLIT.jsonl[.gz] with sentence1, "
        "sentence2, score (STS) or label (pairs), or text, label (classes; clusters if there is no train.jsonl)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="the folder of the results (default: %(default)s)"
    )
    parser.add_argument("--split", default="test", help="the split of the folders' data (default: %(default)s)")
    parser.add_argument(
        "--dims", type=int, nargs="+", default=[], help="the numbers of first dimensions that vectors are cut to"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        default=[],
        help="how documents' vectors are kept: float32, float16, int8, binary, ubinary (default: float32)",
    )
    parser.add_argument(
        "--card",
        action="store_true",
        help="put the table of --dims and --precision into the model's card, and the ranges of int8 beside it",
    )
    parser.add_argument("--parity", action="store_true", help="compare the ways to run the model instead")
    add_batch_size(parser)
    parser.add_argument("--dtype", help="the precision of the weights, such as bfloat16 (default: as saved)")
    parser.add_argument(
        "--attn-implementation", help="the attention: eager, sdpa or flash_attention_2 (default: the LLM's)"
    )
    parser.add_argument(
        "--max-seq-length", type=int, help="the tokens of the longest text, prompt included (default: as saved)"
    )
    parser.add_argument("--device", help="the device to encode on, such as cuda (default: the best there is)")
    add_revision(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    from st_llm_embed.evaluation import compare, evaluate, evaluate_compressed, parity
    from st_llm_embed.evaluation.compression import keep_with_model
    from st_llm_embed.evaluation.parity import as_markdown
    from st_llm_embed.files import check_writable

    sources, tasks, output = arguments.sources, arguments.tasks, arguments.output
    dims, precision = arguments.dims, arguments.precision
    not_settings = {"sources", "tasks", "output", "parity", "dims", "precision", "card", "run", "debug"}
    settings = {key: value for key, value in vars(arguments).items() if key not in not_settings}
    compresses = bool(dims or precision)
    if compresses and (len(sources) > 1 or arguments.parity):
        raise ValueError("--dims and --precision are of one model, and without --parity. Leave the others out.")
    if arguments.card and not (compresses and Path(sources[0], "README.md").is_file()):
        raise ValueError("--card is of --dims or --precision, and of a model's folder with a README.md.")
    if len(sources) > 1 and arguments.parity:
        raise ValueError(f"--parity takes one model, not {len(sources)}: leave out {', '.join(sources[1:])}.")
    if compresses:
        found = evaluate_compressed(
            sources[0], tasks, output, dims=dims, precision=precision or ["float32"], **settings
        )
        print(f"{found.table}\nThis table is {found.folder / 'compressed.md'}; mteb's files are beside it.")
        if arguments.card:
            keep_with_model(found, Path(sources[0]))
    elif len(sources) > 1:
        if settings.pop("revision"):
            raise ValueError(
                f"--revision takes one model, not {len(sources)}. Fix: hf download MODEL --revision REVISION "
                "--local-dir FOLDER, and name the folder."
            )
        compared = compare(sources, tasks, output, **settings)
        print(f"{compared.table}\nThis table is {compared.folder / 'comparison.md'}; mteb's files are beside it.")
    elif arguments.parity:
        check_writable(output)  # as evaluate does by itself
        if chosen := [name for name in ("dtype", "attn_implementation") if settings.pop(name)]:
            raise ValueError(f"--parity compares precisions and attentions itself: leave out {', '.join(chosen)}.")
        table = as_markdown(parity(sources[0], tasks, **settings))
        output.mkdir(parents=True, exist_ok=True)
        (output / "parity.md").write_text(table, encoding="utf-8")
        print(table)
    else:
        evaluated = evaluate(sources[0], tasks, output, **settings)
        print(f"{evaluated.table}\nThis table and mteb's files are in {evaluated.folder}.")
