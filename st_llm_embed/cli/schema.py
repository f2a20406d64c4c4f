"""Print all keys of a configuration, for editors.

Print the JSON schema of the YAML files that train takes: save it, and name it in the file's first line
(# yaml-language-server: $schema=FILE), for completion and checks while writing.
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="print a reference for people instead")


def run(arguments: argparse.Namespace) -> None:
    from st_llm_embed.training.keys import json_schema, reference

    print(reference().rstrip() if arguments.markdown else json.dumps(json_schema(), indent=2))
