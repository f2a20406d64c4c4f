"""Prove that a model folder or a Hub repository does what it says: load it where this package is not, and compare.

A fresh process that cannot import this package loads it and encodes a few texts under every prompt. The vectors must
be those of ``reference.json``, which ``save_sealed`` wrote, or of another model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sentence_transformers.base import BaseModel

from st_llm_embed.files import read_json
from st_llm_embed.hub import fresh_process
from st_llm_embed.hub.teacher import REFERENCE, match, name_teacher, teacher_of
from st_llm_embed.modules import reference
from st_llm_embed.modules.reference import TEXTS, differing_settings, take_reference
from st_llm_embed.trust import check_base, check_no_code, check_saved, fetch, load_trusted, model_class

DTYPES = ("float32", "float16", "bfloat16", "float64")
PACKAGE = __name__.partition(".")[0]
MOST_TEXTS, LONGEST_TEXT = 100, 100_000  # of a reference; characters


class Checked(NamedTuple):
    """What ``check`` found.

    Args:
        difference: the largest difference of a component of any vector.
        files: the size of each file in bytes, by its path in the folder.
        cosines: the mean cosine with the teacher's vectors, of texts as ``query`` and as ``document``; None where no
            teacher was asked.
    """

    difference: float
    files: dict[str, int]
    cosines: dict[str, float] | None = None


class FreshPython:
    """A Python that cannot import this package. It starts once, which takes seconds, and loads each folder in a fork.

    It sees neither PYTHONPATH nor the working directory, which could bring the package back, and no network.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> FreshPython:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.communicate()  # at the end of its input it ends

    def _started(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-I", fresh_process.__file__, PACKAGE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                # Else torch would look for GPUs in a way that none can be used after a fork.
                env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
            )
        return self.process

    def take_reference(self, root: Path, texts: Sequence[str], device: str, known: bool) -> dict[str, Any]:
        """What ``root`` gives for texts.

        Args:
            root: the model's folder.
            texts: the texts to encode.
            device: the device to encode them on.
            known: whether all its code is this package's. Then only that is run, and the hosts do not trust the rest.

        Raises:
            ValueError: if it is of no class that is opened here.
            RuntimeError: if it cannot be loaded there.
        """
        with tempfile.TemporaryDirectory() as scratch:
            if known:
                published = Path(scratch, "code", "published")
                published.mkdir(parents=True)
                for file in root.glob("*.py"):
                    shutil.copy(file, published)
            request = {
                "folder": str(root.resolve()),
                "device": device,
                "texts": list(texts),
                "reference": reference.__file__,
                "model_class": model_class(root).__name__,
                "code": str(Path(scratch, "code")) if known else None,
                "scratch": scratch,
            }
            process = self._started()
            assert process.stdin is not None and process.stdout is not None  # _started asks for pipes
            print(json.dumps(request), file=process.stdin, flush=True)
            status = process.stdout.readline().strip()
            if status != "0":
                log = Path(scratch, "log")
                printed = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
                raise RuntimeError(f"{root} does not load in a process without {PACKAGE!r}: {_last_error(printed)}")
            return json.loads(Path(scratch, "taken.json").read_text(encoding="utf-8"))


_kept: FreshPython | None = None


@contextmanager
def fresh_python() -> Iterator[FreshPython]:
    """For many checks: those within share one process, whose start takes most of a check's time."""
    global _kept
    if _kept is not None:
        yield _kept
        return
    with FreshPython() as _kept:
        try:
            yield _kept
        finally:
            _kept = None


def check(
    source: str | Path,
    against: BaseModel | str | Path | None = None,
    *,
    trust_remote_code: bool = False,
    device: str = "cpu",
    revision: str | None = None,
    token: str | None = None,
) -> Checked:
    """Load a model in a fresh process that cannot import this package, and compare its vectors.

    Args:
        source: the model's folder or Hub id.
        against: the model whose vectors they must equal; or the folder or Hub id of another form of the model, such as
            the adapter of a merged one. Default: the ``reference.json`` in ``source``. Its teacher, which the folder
            names, is compared with by cosines, in this process.
        trust_remote_code: whether to run the code in ``source`` (and ``against``) even where it is not this package's
            own.
        device: the device of the fresh process.
        revision: the branch, tag or commit of ``source``.
        token: the Hub token.

    Raises:
        FileNotFoundError: if ``source`` is no model folder, or there is nothing to compare with.
        ValueError: if it does not hold data alone, has unknown code, or a reference of another form.
        RuntimeError: if it does not load, or a component differs by more than 1e-5 (or, in half precision, by its
            last bit), of vectors that are longer than 1 by that share of their length.
    """
    root, known = _opened(source, revision, token, trust_remote_code)
    if (teacher := teacher_of(root)) is not None and isinstance(against, str | Path):
        asked = name_teacher(against)
        is_repository = not Path(against).is_dir()
        if asked.revision == teacher.revision or (is_repository and asked.name == teacher.name):
            checked = (
                compare(root, known, trust_remote_code=trust_remote_code, device=device, token=token)
                if (root / REFERENCE).is_file()
                else Checked(0.0, files_of(root))
            )
            student, large = (load_trusted(one, trust_remote_code, device=device) for one in (root, fetch(against)))
            large.truncate_dim = teacher.dimensions or large.truncate_dim
            return checked._replace(cosines=match(student, large))
        try:
            return compare(root, known, against, trust_remote_code=trust_remote_code, device=device, token=token)
        except RuntimeError as error:
            raise RuntimeError(
                f"{error} {against} is not its teacher, with which it would be compared by cosines: that is "
                f"{teacher.name}, revision {teacher.revision}."
            ) from error
    return compare(root, known, against, trust_remote_code=trust_remote_code, device=device, token=token)


def compare(
    root: Path,
    known: bool,
    against: BaseModel | str | Path | None = None,
    *,
    trust_remote_code: bool = False,
    device: str = "cpu",
    token: str | None = None,
) -> Checked:
    """``check`` of a folder that was looked through, or written here.

    Args:
        root: the model's folder.
        known: whether the code in its root is all that it needs; then the hosts are not told to trust it.
        against, trust_remote_code, device, token: see ``check``.
    """
    with fresh_python() as python:
        if isinstance(against, BaseModel):
            expected = take_reference(against)
        elif against is not None:
            other, other_known = _opened(against, None, token, trust_remote_code)
            expected = python.take_reference(other, TEXTS, device, other_known)
        elif (root / REFERENCE).is_file():
            expected = read_reference(root / REFERENCE)
        else:
            raise FileNotFoundError(
                f"{root} has no {REFERENCE}, so there is nothing to compare it with. save_sealed and publish write "
                "one; or name another form of the model to compare with (against=)."
            )
        actual = python.take_reference(root, expected["texts"], device, known)
    difference, name = max(_differences(expected, actual))
    # By what is there, and not by what the file that is checked says of itself.
    longest = max(math.hypot(*vector) for vectors in expected["embeddings"].values() for vector in vectors)
    tolerance = max(1e-5, torch.finfo(getattr(torch, actual["dtype"])).eps) * max(1.0, longest)
    if not difference <= tolerance:
        causes = differing_settings(expected, actual)
        causes |= {"prompts": "others"} if expected["prompts"] != actual["prompts"] else {}
        if not causes and expected["dtype"] in ("float16", "bfloat16"):
            causes["precision"] = (
                "casting the LLM by itself also rounds what it computes from its config, such as rotary frequencies; "
                "cast the whole model (model.half(), model.bfloat16()) or load it with model_kwargs={'dtype': ...}"
            )
        listed = "; ".join(f"{setting}: {change}" for setting, change in causes.items())
        raise RuntimeError(
            f"{root} gives other vectors in a fresh process: they differ by {difference:.1e} under the prompt "
            f"{name!r}, and at most {tolerance:.0e} is rounding. Settings that differ: {listed or 'none'}."
        )
    return Checked(difference, files_of(root))


def read_reference(file: Path) -> dict[str, Any]:
    """The content of a ``reference.json``.

    Raises:
        ValueError: naming the part that is not there or of another form.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no JSON object.")
    texts, embeddings = content.get("texts"), content.get("embeddings")
    count = len(texts) if isinstance(texts, list) else 0
    forms = {
        "texts": isinstance(texts, list) and 0 < count <= MOST_TEXTS and all(map(_is_text, texts)),
        "prompts": _is_mapping(content.get("prompts"), _is_text),
        "embeddings": _is_mapping(embeddings, lambda rows: _are_vectors(rows, count)),
        "token_ids": _is_mapping(content.get("token_ids"), _are_numbers),
        "token_ids_without_prompt": _are_numbers(content.get("token_ids_without_prompt")),
        "bidirectional": isinstance(content.get("bidirectional"), bool),
        "dtype": content.get("dtype") in DTYPES,
        "attn_implementation": isinstance(content.get("attn_implementation"), str),
        "versions": _is_mapping(content.get("versions"), lambda version: isinstance(version, str)),
    }
    if malformed := [name for name, is_right in forms.items() if not is_right]:
        raise ValueError(f"{file} has no {', no '.join(malformed)} of the form that save_sealed writes.")
    return content


def _is_text(content: Any) -> bool:
    return isinstance(content, str) and len(content) <= LONGEST_TEXT


def _is_mapping(content: Any, holds: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(map(holds, content.values()))


def _are_numbers(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in content)


def _are_vectors(rows: Any, count: int) -> bool:
    return isinstance(rows, list) and len(rows) == count and all(map(_are_numbers, rows)) and all(rows)


def _opened(source: str | Path, revision: str | None, token: str | None, trust: bool) -> tuple[Path, bool]:
    """A model's folder, and whether all its code is this package's. An adapter's base is downloaded too."""
    root = fetch(source, revision, token)
    check_saved(root)
    unknown = check_no_code(root, trust)
    check_base(root, trust, token)
    return root, not unknown


def _last_error(log: str) -> str:
    """The message of the last error in what a process printed, without the places that it came through."""
    lines = [line for line in log.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback")]
    if not starts:
        return "\n".join(lines[-5:]) or "it ended without a word"
    after = [line for line in lines[starts[-1] + 1 :] if not line.startswith(" ")]
    return "\n".join(after)[:2000]


def _differences(expected: dict[str, Any], actual: dict[str, Any]) -> list[tuple[float, str]]:
    """The largest difference under each prompt; infinite for a prompt that is gone."""
    differences = []
    for name, vectors in expected["embeddings"].items():
        others = actual["embeddings"].get(name, [])
        if [len(row) for row in others] == [len(row) for row in vectors]:
            apart = (torch.tensor(others) - torch.tensor(vectors)).abs().max().item()
            differences.append((math.inf if math.isnan(apart) else apart, name))
        else:
            differences.append((math.inf, name))
    return differences


def files_of(root: Path) -> dict[str, int]:
    """The size of each file in bytes, by its path in the folder."""
    return {str(file.relative_to(root)): file.stat().st_size for file in sorted(root.rglob("*")) if file.is_file()}
