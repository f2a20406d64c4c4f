"""The command ``st-llm-embed``: one file for each step of the main job, whose docstring is its help.

Only a command that runs imports torch.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from st_llm_embed.cli import (
    align,
    average,
    build,
    check,
    convert,
    encode,
    evaluate,
    export,
    export_onnx,
    merge,
    mine,
    publish,
    schema,
    seal,
    search,
    split,
    train,
)
from st_llm_embed.version import __version__

# In the order of the work.
COMMANDS = (
    split,
    build,
    mine,
    schema,
    train,
    align,
    average,
    merge,
    export,
    convert,
    evaluate,
    encode,
    search,
    seal,
    check,
    export_onnx,
    publish,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; for an expected error, one message, 2; for an unexpected one, its traceback, 1; for Ctrl-C 130, for SIGTERM
        143, both after what was half-written is gone.
    """
    arguments = parser().parse_args(argv)
    try:
        with _terminable():
            arguments.run(arguments)
    except KeyboardInterrupt as stop:
        print("st-llm-embed: interrupted; nothing was left half-written.", file=sys.stderr)
        return 143 if stop.args == (signal.SIGTERM,) else 130
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of tokenizers, in Rust
            raise
        from pickle import UnpicklingError  # weights that would run code

        from safetensors import SafetensorError  # a full disk, or a file that is cut off

        expected = (ValueError, OSError, ImportError, RuntimeError, ArithmeticError, SafetensorError, UnpicklingError)
        if not isinstance(error, expected):
            traceback.print_exc()
            print(
                "st-llm-embed: this is a bug of this package. Please report it, with the lines above and the command.",
                file=sys.stderr,
            )
            return 1
        if arguments.debug:
            traceback.print_exc()
        print(f"st-llm-embed: error: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    whole = argparse.ArgumentParser(
        prog="st-llm-embed",
        description="Turn a decoder-only LLM into a text-embedding model for sentence-transformers.",
    )
    whole.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = whole.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        summary, _, description = (command.__doc__ or "").partition("\n\n")
        name = command.__name__.rpartition(".")[2].replace("_", "-")
        own = commands.add_parser(name, help=summary, description=description)
        command.add_arguments(own)
        own.add_argument("--debug", action="store_true", help="show where in the code an error arose, too")
        own.set_defaults(run=command.run)
    return whole


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, with which schedulers end a run, as Ctrl-C."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():  # where Python sets no handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
