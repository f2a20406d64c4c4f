"""Make a published NV-Embed or LLaRA checkpoint load with sentence-transformers.

Read nvidia/NV-Embed-v1 or -v2, or BAAI/LLARA-pretrain, -passage, -document or -beir (a Hub id or a folder) without
running its code, and write a folder that sentence-transformers loads, fine-tunes and saves. The licence of the weights
stays theirs (NV-Embed: CC-BY-NC-4.0).
"""

from __future__ import annotations

import argparse

from st_llm_embed.cli.shared import NEW_FOLDER


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="the Hub id or folder of the checkpoint")
    parser.add_argument("output", help=NEW_FOLDER)


def run(arguments: argparse.Namespace) -> None:
    from huggingface_hub import metadata_load

    from st_llm_embed.convert import convert

    folder = convert(arguments.source, arguments.output)
    print(f"Wrote {folder}.")
    if (metadata_load(folder / "README.md") or {}).get("license") == "cc-by-nc-4.0":
        print("Its weights are licensed under CC-BY-NC-4.0: no commercial use.")
    print(f'Load it with SentenceTransformer("{folder}", trust_remote_code=True).')
