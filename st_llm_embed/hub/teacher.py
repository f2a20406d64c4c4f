"""Whose space a model's vectors are in, if it was taught by another: kept with it, and shown in its card.

A folder names the teacher in ``reference.json`` once it is sealed, and in ``teacher.json`` before. Neither is kept
where sentence-transformers saves the model again, which may have left the space by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sentence_transformers import SentenceTransformer
from sentence_transformers.util import pairwise_cos_sim

from st_llm_embed.encoding.ranges import RANGES
from st_llm_embed.files import hash_files, read_json
from st_llm_embed.trust import fetch

FILE, REFERENCE = "teacher.json", "reference.json"
SECTION = """## A shared space

Its vectors are in the {which} of `{name}` (revision {revision}): they compare with that model's, and its queries
search that model's index.

"""
TEXTS = (
    "How do I parse command line arguments?",
    "argparse turns the strings of sys.argv into Python objects, and writes the help.",
    "Can I get my money back if the train is late?",
    "A refund of half the fare is due from an hour of delay on.",
    "The kidneys filter waste and extra water out of the blood.",
    "symptoms of chronic kidney disease",
    "Two dogs are running across a field of snow.",
    "list all files that were changed in the last two days",
)


class TeacherName(NamedTuple):
    """A teacher.

    Args:
        name: its Hub id, or the name of its folder.
        revision: the commit of its repository, or a hash of its folder's files.
        dimensions: how many of its first dimensions they are. Default: all.
    """

    name: str
    revision: str
    dimensions: int | None = None

    @property
    def section(self) -> str:
        """Markdown for the student's card."""
        which = "space" if self.dimensions is None else f"first {self.dimensions} dimensions of the space"
        return SECTION.format(which=which, name=self.name, revision=self.revision)


def name_teacher(source: str | Path, revision: str | None = None) -> TeacherName:
    """The name of a model: a folder, or a Hub id and a branch, tag or commit of it."""
    root = fetch(source, revision)
    if not Path(source).is_dir():
        return TeacherName(str(source), root.name)
    found = [file for file in sorted(root.rglob("*")) if file.is_file() and file.suffix in (".json", ".safetensors")]
    files = [file for file in found if file.name != RANGES]
    path = root.resolve()
    stage = f"{path.parent.parent.name}/{path.parent.name}"  # a run calls each stage's folder so
    return TeacherName(stage if path.name == "model" else path.name, hash_files(root, files))


def teacher_of(root: Path) -> TeacherName | None:
    """The teacher whose space the model in a folder is in, as the folder says.

    Raises:
        ValueError: for a file of another form.
    """
    for file, key in ((root / REFERENCE, "teacher"), (root / FILE, None)):
        content = read_json(file) if file.is_file() else None
        named = content.get(key) if key and isinstance(content, Mapping) else content
        if named is None:
            continue
        if not isinstance(named, Mapping) or not all(isinstance(named.get(key), str) for key in ("name", "revision")):
            raise ValueError(f"{file} names no teacher of the form that this package writes: {str(named)[:200]}.")
        dimensions = named.get("dimensions")
        return TeacherName(named["name"], named["revision"], dimensions if isinstance(dimensions, int) else None)
    return None


def match(
    student: SentenceTransformer, teacher: SentenceTransformer, texts: Sequence[str] = TEXTS
) -> dict[str, float]:
    """The mean cosine of the vectors of two models, each under its own prompts: of texts as queries and as documents.

    Raises:
        ValueError: if their vectors are of different widths.
    """
    sides = {
        "query": [model.encode_query(list(texts)) for model in (student, teacher)],
        "document": [model.encode_document(list(texts)) for model in (student, teacher)],
    }
    widths = [vectors.shape[1] for vectors in sides["query"]]
    if len(set(widths)) > 1:
        raise ValueError(
            f"The student's vectors have {widths[0]} dimensions and the teacher's {widths[1]}: they are not in one "
            "space."
        )
    return {name: float(pairwise_cos_sim(*vectors).mean()) for name, vectors in sides.items()}
