"""An encoded corpus, in its own order: for a database, an index, or whoever else takes all of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from st_llm_embed.encoding.corpus import REPORT
from st_llm_embed.encoding.shards import is_whole, read_manifest, read_vectors, rows_file, shard_file
from st_llm_embed.files import read_json


def read_shards(folder: str | Path) -> Iterator[tuple[list[Any], np.ndarray]]:
    """The ids and the vectors of one shard after another; in memory is one at a time.

    Args:
        folder: a folder that ``CorpusEncoding`` wrote, to the end.

    Returns:
        ``(ids, vectors)`` of each shard: the vectors ``(rows, dim)`` as they were kept, in float32, float16 or int8;
        binary ones in int8 too, eight signs in each.

    Raises:
        ValueError: if it is none, or not whole, before the first shard is read.
    """
    files = _files(Path(folder))
    return ((pq.read_table(rows_file(file), columns=["id"])["id"].to_pylist(), read_vectors(file)) for file in files)


def _files(folder: Path) -> list[Path]:
    manifest = read_manifest(folder)
    if manifest is None or "shard_size" not in manifest:
        raise ValueError(
            f"{folder} has no manifest.json of a whole corpus. Name a folder that st-llm-embed encode wrote."
        )
    if manifest["rows"] is not None:
        count = -(-manifest["rows"] // manifest["shard_size"])
    elif (folder / REPORT).is_file():
        count = read_json(folder / REPORT)["shards"]
    else:
        raise ValueError(
            f"{folder} has no {REPORT}, so that the stream may not have been encoded to its end. Run the same encode "
            "command again: it goes on where it was."
        )
    files = [shard_file(folder, number, manifest["file_format"]) for number in range(count)]
    if missing := [file for file in files if not is_whole(file)]:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {count} shards, such as {missing[0].name}, or they are damaged. Run "
            "the same encode command again: it encodes what is missing."
        )
    return files
