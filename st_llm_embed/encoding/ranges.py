"""The ranges by which vectors are kept in eight bits: each dimension's least and largest number in a sample.

``int8_ranges.json``, which lies beside a model's weights, has them for each width that the vectors are cut to: the two
rows ``(2, width)`` that ``quantize_embeddings`` of sentence-transformers takes, by the name of the width. Beside them
is what the model gives for a few texts, so that nobody keeps another model's vectors by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from st_llm_embed.encoding.manifest import is_same_reference
from st_llm_embed.files import read_json, write_json, written_beside

# No .safetensors: vLLM and SGLang take every such file for weights.
RANGES = "int8_ranges.json"


def ranges_of(vectors: np.ndarray) -> np.ndarray:
    """``(2, dim)``: the least and the largest number of each dimension of ``vectors`` ``(texts, dim)``."""
    return np.stack([vectors.min(axis=0), vectors.max(axis=0)])


def write_ranges(folder: Path, ranges: Mapping[int, np.ndarray], space: Mapping[str, Any], texts: int) -> Path:
    """Write ranges into a folder.

    Args:
        folder: the folder, a model's or another.
        ranges: ``(2, width)`` by width.
        space: whose vectors they are of, as ``space_of`` an encoder says.
        texts: the number of texts in the sample.
    """
    file = folder / RANGES
    rows = {str(width): own.astype(np.float32).tolist() for width, own in ranges.items()}
    with written_beside(file) as staged:
        write_json(staged, {"texts": texts, "reference": space["reference"], "ranges": rows})
    return file


def read_ranges(file: Path, space: Mapping[str, Any]) -> dict[int, np.ndarray]:
    """The ranges ``(2, width)``, by width, of a file that ``write_ranges`` wrote.

    Args:
        file: the file, or the folder that it is in.
        space: whose vectors are to be kept by them, as ``space_of`` an encoder says.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is no such file, or of another model or prompt.
    """
    file = file / RANGES if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there. st-llm-embed evaluate MODEL --precision int8 writes it.")
    try:
        content = read_json(file)
        reference = np.array(content["reference"], np.float64)
        ranges = {int(width): np.array(rows, np.float32) for width, rows in content["ranges"].items()}
        if wrong := [width for width, rows in ranges.items() if rows.shape != (2, width)]:
            raise ValueError(f"the ranges {wrong[0]} are {ranges[wrong[0]].shape}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} has no ranges that st-llm-embed wrote: {error!r}.") from error
    if not is_same_reference(space, reference):
        raise ValueError(
            f"{file} has the ranges of another model or prompt: for the same texts it gave other vectors. Take ranges "
            "of this model: st-llm-embed evaluate MODEL --precision int8."
        )
    return ranges


def range_of(file: Path, width: int, space: Mapping[str, Any]) -> np.ndarray:
    """``(2, width)``: those of one width; see ``read_ranges``.

    Raises:
        ValueError: if there are none of this width, too.
    """
    ranges = read_ranges(file, space)
    if width not in ranges:
        raise ValueError(
            f"{file} has ranges for vectors of {', '.join(map(str, ranges))} numbers, and these have {width}."
        )
    return ranges[width]
