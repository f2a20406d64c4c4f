"""Write a model as one ONNX graph.

Write a model as one ONNX graph from token ids to embeddings, with the tokenizer and the prompts beside it, for ONNX
Runtime, OpenVINO and Text Embeddings Inference. It is compared with the model before it is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from st_llm_embed.cli.shared import MODEL, NEW_FOLDER, add_revision, add_trust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=MODEL)
    parser.add_argument("output", help=NEW_FOLDER)
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--int8",
        action="store_const",
        dest="precision",
        const="int8",
        help="weights and token embeddings in eight bits: a quarter of the size",
    )
    precision.add_argument(
        "--float16", action="store_const", dest="precision", const="float16", help="half the size, for GPUs"
    )
    parser.add_argument("--opset", type=int, help="the version of ONNX's operators, 18 to 23 (default: 20)")
    add_revision(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    from st_llm_embed.files import check_empty
    from st_llm_embed.hub.checking import read_reference
    from st_llm_embed.serving.onnx_export import OPSET, REFERENCE, check_installed, check_settings, export_onnx
    from st_llm_embed.trust import fetch, load_trusted

    check_empty(Path(arguments.output).resolve())
    check_installed()
    precision, opset = arguments.precision or "float32", OPSET if arguments.opset is None else arguments.opset
    check_settings(precision, opset)
    root = fetch(arguments.source, arguments.revision)
    file = root / REFERENCE
    reference = read_reference(file) if file.is_file() else None
    model = load_trusted(root, arguments.trust_remote_code)
    written = export_onnx(model, arguments.output, precision=precision, opset=opset, reference=reference)
    print(f"Wrote {written}.")
