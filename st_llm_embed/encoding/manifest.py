"""What a folder of vectors says of itself, so that nobody puts another model's beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import ArrayLike

from st_llm_embed.encoding.encoder import TextEncoder
from st_llm_embed.encoding.shards import MANIFEST, read_manifest
from st_llm_embed.modules.reference import HALF_ROUNDING, ROUNDING, TEXTS


def space_of(encoder: TextEncoder) -> dict[str, Any]:
    """The part of a manifest that says whose vectors these are: ``identity``, what it means, and the vectors of a few
    texts."""
    reference = np.round(encoder.encode(list(TEXTS)).astype(np.float64), 7)
    if not np.isfinite(reference).all():
        raise ValueError(
            "The model gives NaN or infinity. Load it in another precision: --dtype float32, or "
            "SentenceTransformer(..., model_kwargs={'dtype': 'float32'})."
        )
    return {"identity": encoder.identity, **encoder.description, "reference": reference.tolist()}


def is_same_space(space: Mapping[str, Any], manifest: Mapping[str, Any]) -> bool:
    """Whether a folder has the vectors of this encoder, within the rounding of machines."""
    return space["identity"] == manifest.get("identity") and is_same_reference(space, manifest["reference"])


def is_same_reference(space: Mapping[str, Any], reference: ArrayLike) -> bool:
    """Whether the vectors of a few texts are this encoder's, within the rounding of machines."""
    ours, theirs = np.array(space["reference"]), np.array(reference)
    rounding = ROUNDING if space.get("dtype") == "float32" else HALF_ROUNDING
    return ours.shape == theirs.shape and bool(np.abs(ours - theirs).max() <= rounding * np.abs(theirs).max())


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Put a manifest into a folder, unless it has one. Whichever process comes first, all get the same."""
    folder.mkdir(parents=True, exist_ok=True)
    if found := read_manifest(folder):
        return found
    staged = folder / f".{MANIFEST}-{uuid4().hex}"
    settings = {name: value for name, value in manifest.items() if name != "reference"}
    readable = json.dumps(settings, indent=1).removesuffix("\n}")  # the numbers of the reference in one line
    text = f'{readable},\n "reference": {json.dumps(manifest["reference"])}\n}}\n'
    staged.write_text(text, encoding="utf-8")
    try:
        os.link(staged, folder / MANIFEST)
    except FileExistsError:
        pass
    except OSError:  # a file system without links: the last of two at once stays, and both are whole
        staged.replace(folder / MANIFEST)
    staged.unlink(missing_ok=True)
    return read_manifest(folder) or manifest
