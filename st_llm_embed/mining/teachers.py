"""A teacher: any model that gives each text one vector, looked at before it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model import BaseModel
from transformers import CONFIG_MAPPING

from st_llm_embed.files import read_json
from st_llm_embed.trust import check_no_code, fetch, load_trusted


def load_teacher(
    source: str, trust_remote_code: bool = False, revision: str | None = None, **kwargs: Any
) -> SentenceTransformer:
    """A model of the Hub or a folder.

    Raises:
        ValueError: if it runs code that is not known, or is another kind of model, which sentence-transformers would
            give an untrained pooling.
    """
    return load_trusted(find_teacher(source, trust_remote_code, revision), trust_remote_code, **kwargs)


def find_teacher(source: str, trust_remote_code: bool = False, revision: str | None = None) -> Path:
    """The folder of a teacher, which is not loaded yet.

    Raises:
        ValueError: if it is no model, or another kind of one.
        OSError: if it is neither here nor on the Hub.
    """
    root, kind = find_model(source, "teacher", trust_remote_code, revision)
    if kind != "SentenceTransformer":
        raise _no_teacher(kind)
    return root


def find_model(
    source: str, role: str, trust_remote_code: bool = False, revision: str | None = None
) -> tuple[Path, str]:
    """The folder of a model, which is not loaded yet, and which class of sentence-transformers it is for:
    ``SentenceTransformer``, ``CrossEncoder``, ...; or ``causal LLM``.

    Args:
        source: the folder or Hub id.
        role: what errors call it.
        trust_remote_code: whether it may run code that this package does not ship.
        revision: the branch, tag or commit of its repository.

    Raises:
        ValueError: if it is no model, or runs code that is not known.
        OSError: if it is neither here nor on the Hub.
    """
    root = fetch(source, revision)
    if not any((root / name).is_file() for name in ("modules.json", "config.json")):
        raise ValueError(f"The {role} {source!r} is no model: it has neither a modules.json nor a config.json.")
    check_no_code(root, trust_remote_code)

    def saved(name: str) -> dict:
        return read_json(root / name) if (root / name).is_file() else {}

    kind = saved("config_sentence_transformers.json").get("model_type", "SentenceTransformer")
    heads = [] if saved("modules.json") else saved("config.json").get("architectures") or []
    if any(str(head).endswith("ForSequenceClassification") for head in heads):
        kind = "CrossEncoder"
    known = saved("config.json").get("model_type") in CONFIG_MAPPING  # of another the loaders say what is amiss
    if known and any(str(head).endswith("ForCausalLM") for head in heads):
        kind = "causal LLM"
    return root, kind


def check_teacher(teacher: SentenceTransformer) -> None:
    """Check that a teacher gives each text one vector.

    Raises:
        ValueError: if it is another kind of model.
    """
    is_other_kind = isinstance(teacher, BaseModel) and not isinstance(teacher, SentenceTransformer)
    if is_other_kind or not all(hasattr(teacher, method) for method in ("encode_query", "encode_document")):
        raise _no_teacher(type(teacher).__name__)


def _no_teacher(kind: str) -> ValueError:
    return ValueError(
        f"The teacher is a {kind}. A teacher is a SentenceTransformer (a bi-encoder): it gives each text one vector, "
        "so that every anchor is compared with all documents. Fix: SentenceTransformer('org/model')."
    )
