"""Write an adapted LLM as a plain causal LM.

Write the LLM of a model as a folder for AutoModelForCausalLM: its weights, in the base's configuration, with the
base's tokenizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from st_llm_embed.cli.shared import NEW_FOLDER, add_trust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="the folder of a model that attends causally")
    parser.add_argument("base", help="the Hub id or folder of the LLM that the model was built from")
    parser.add_argument("output", help=NEW_FOLDER)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    from st_llm_embed.files import check_empty
    from st_llm_embed.trust import load_trusted
    from st_llm_embed.weights import export_causal_lm

    check_empty(Path(arguments.output).resolve())
    model = load_trusted(arguments.source, arguments.trust_remote_code)
    print(f"Wrote {export_causal_lm(model, arguments.base, arguments.output)}.")
