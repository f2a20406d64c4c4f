"""Published checkpoints as models of this package: no remote code of theirs is run."""

from __future__ import annotations

from pathlib import Path

from st_llm_embed.convert.checkpoint import is_nv_embed
from st_llm_embed.convert.llara import convert_llara
from st_llm_embed.convert.nv_embed import convert_nv_embed, load_nv_embed
from st_llm_embed.files import check_empty

__all__ = ["convert", "convert_llara", "convert_nv_embed", "load_nv_embed"]


def convert(source: str | Path, output: str | Path) -> Path:
    """Write a published NV-Embed or LLaRA checkpoint as a model folder, by ``convert_nv_embed`` or ``convert_llara``.

    Args:
        source: a local folder, or a Hub id.
        output: the folder to write; must not exist, or be empty.

    Returns:
        ``output``. It loads with ``SentenceTransformer(output, trust_remote_code=True)``.

    Raises:
        FileExistsError: if ``output`` holds something.
        OSError: if ``output`` cannot be written, or its disk has no room for the model.
        FileNotFoundError: if files of the checkpoint are missing, as after half a download.
        ValueError: if it is neither of the two.
    """
    check_empty(Path(output).resolve())  # before a download
    return (convert_nv_embed if is_nv_embed(source) else convert_llara)(source, output)
