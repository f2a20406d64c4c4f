"""Load a model where this package is not, and compare its vectors.

Load a folder or a Hub repository in a fresh process without this package, and compare its embeddings with the
reference.json in it, or with another form of the model, or with its teacher's. Shows its files.
"""

from __future__ import annotations

import argparse

from st_llm_embed.cli.shared import MODEL, add_revision, add_trust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=MODEL)
    parser.add_argument(
        "--against",
        help="the folder or Hub id of another form of the model, which must give the same vectors, such as the "
        "adapter of a merged one; or of its teacher, whose vectors' cosine with its own is told",
    )
    parser.add_argument("--device", default="cpu", help="the device to encode on (default: %(default)s)")
    add_revision(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    from st_llm_embed.hub import check

    options = {"trust_remote_code": arguments.trust_remote_code, "device": arguments.device}
    checked = check(arguments.source, arguments.against, revision=arguments.revision, **options)
    for path, size in checked.files.items():
        # Unprintable characters of a name could imitate the lines below.
        print(f"{size:>15,} {path if path.isprintable() else ascii(path)}")
    print(f"{sum(checked.files.values()):>15,} bytes in {len(checked.files)} files.")
    if checked.cosines is not None:
        told = ", ".join(f"{cosine:.3f} as {side}" for side, cosine in checked.cosines.items())
        print(f"The mean cosine with the teacher's vectors of the same texts is {told}.")
    print(f"The embeddings are the expected ones: no component differs by more than {checked.difference:.1e}.")
