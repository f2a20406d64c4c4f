"""Load a model where this package is not, or ask a server that has it, and compare its vectors.

Load a folder or a Hub repository in a fresh process without this package, and compare its embeddings with the
reference.json in it, or with another form of the model, or with its teacher's. Shows its files. With --url, what a
running server gives is compared with reference.json instead, prompt by prompt, and with --vectors, what a client gave;
what differs is named: prompt, BOS, EOS, mask, pooling, normalisation, dimensions, truncation or precision.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from st_llm_embed.cli.shared import MODEL, add_revision, add_trust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=MODEL)
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--against",
        help="the folder or Hub id of another form of the model, which must give the same vectors, such as the "
        "adapter of a merged one; or of its teacher, whose vectors' cosine with its own is told",
    )
    given.add_argument(
        "--url",
        help="the address of a server with OpenAI's /v1/embeddings or TEI's /embed, such as http://localhost:8000; it "
        "is sent each text after the prompt, or inside the prompt's {text}, as a client has to; the key that it wants "
        "is in the environment, as OPENAI_API_KEY",
    )
    given.add_argument(
        "--vectors",
        help="a file of a client's vectors of the texts in reference.json, in their order: .json, "
        '{"query": [[0.1, ...], ...]} with the names of prompts, or a list or .npy (texts, dim) under --prompt',
    )
    parser.add_argument("--served-name", help="the name of the model on the server (default: the one that it has)")
    parser.add_argument("--prompt", help="the name of the prompt that the texts of --vectors should have had")
    parser.add_argument("--device", default="cpu", help="the device to encode on (default: %(default)s)")
    add_revision(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.served_name is not None and arguments.url is None:
        raise ValueError("--served-name is of a server, and there is no --url.")
    if arguments.prompt is not None and arguments.vectors is None:
        raise ValueError("--prompt is of --vectors, and there are none.")
    options = {
        "trust_remote_code": arguments.trust_remote_code,
        "device": arguments.device,
        "revision": arguments.revision,
    }
    if arguments.url is None and arguments.vectors is None:
        _check_folder(arguments.source, arguments.against, options)
        return
    from st_llm_embed.serving.server_check import check_server, check_vectors

    if arguments.url is not None:
        compared = check_server(arguments.source, arguments.url, arguments.served_name, **options)
    else:
        compared = check_vectors(arguments.source, arguments.vectors, arguments.prompt, **options)
    for prompt, cosine in compared.cosines.items():
        print(f"{cosine:>10.6f} is the least cosine under {prompt!r}.")
    for remark in compared.remarks:
        print(remark)
    print(f"The vectors of {arguments.url or arguments.vectors} are the model's.")


def _check_folder(source: str, against: str | None, options: dict[str, Any]) -> None:
    from st_llm_embed.hub import check
    from st_llm_embed.serving.onnx_export import is_onnx_folder

    if is_onnx_folder(Path(source)):
        from st_llm_embed.serving.onnx_checking import check_onnx  # needs onnxruntime

        if against is not None:
            raise ValueError(f"{source} is an ONNX folder, which is compared with its own reference.json only.")
        checked = check_onnx(Path(source))
    else:
        checked = check(source, against, **options)
    for path, size in checked.files.items():
        # Unprintable characters of a name could imitate the lines below.
        print(f"{size:>15,} {path if path.isprintable() else ascii(path)}")
    print(f"{sum(checked.files.values()):>15,} bytes in {len(checked.files)} files.")
    if checked.cosines is not None:
        told = ", ".join(f"{cosine:.3f} as {side}" for side, cosine in checked.cosines.items())
        print(f"The mean cosine with the teacher's vectors of the same texts is {told}.")
    print(f"The embeddings are the expected ones: no component differs by more than {checked.difference:.1e}.")
