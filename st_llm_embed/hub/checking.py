"""Prove that a model folder or a Hub repository does what it says: load it where this package is not, and compare.

A fresh process that cannot import this package loads it and encodes a few texts under every prompt. The vectors must
be those of ``reference.json``, which ``save_sealed`` wrote, or of another model.

Code of a repository runs only where its hash is that of a file which this package ships, or where the caller says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from sentence_transformers import SentenceTransformer

from st_llm_embed.hub.folders import PICKLES, STOCK, demand_contained, has_code, read_json
from st_llm_embed.modules import reference
from st_llm_embed.modules.adapters import ADAPTER_CONFIG, OWN_BASE
from st_llm_embed.modules.reference import TEXTS, differing_settings, take_reference

REFERENCE = "reference.json"
FRESH_PROCESS = """
import sys
folder, device, trust, hidden, reference, out = sys.argv[1:]
sys.modules[hidden] = None  # importing it now fails
import json, runpy
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(folder, device=device, trust_remote_code=trust == "trust", local_files_only=True)
taken = runpy.run_path(reference)["take_reference"](model, json.loads(sys.stdin.read()))
with open(out, "w", encoding="utf-8") as file:
    json.dump(taken, file)
"""


class Checked(NamedTuple):
    """What ``check`` found.

    Args:
        difference: the largest of any component of any vector.
        files: bytes by path in the folder.
    """

    difference: float
    files: dict[str, int]


def check(
    source: str | Path,
    against: SentenceTransformer | str | Path | None = None,
    *,
    trust_remote_code: bool = False,
    device: str = "cpu",
    revision: str | None = None,
    token: str | None = None,
) -> Checked:
    """Load a model in a fresh process that cannot import this package, and compare its vectors.

    Args:
        source: a folder, or a Hub id.
        against: what they must equal: a model; or a folder or Hub id of another form of it, such as the adapter of a
            merged model. Default: the ``reference.json`` in ``source``.
        trust_remote_code: run the code in ``source`` (and ``against``) even where it is not this package's own.
        device: of the fresh process.
        revision: branch, tag or commit of ``source``.
        token: Hub token.

    Raises:
        FileNotFoundError: if it is no model folder, or there is nothing to compare with.
        ValueError: if it names or links to something outside of it, holds pickles, or has unknown code.
        RuntimeError: if it does not load, or a component differs by more than 1e-5 (or, in half precision, by its
            last bit).
    """
    root = _safe_folder(source, revision, token)
    if isinstance(against, SentenceTransformer):
        expected = take_reference(against)
    elif against is not None:
        expected = _taken_afresh(_safe_folder(against, None, token), TEXTS, trust_remote_code, device)
    elif (root / REFERENCE).is_file():
        expected = read_json(root / REFERENCE)
    else:
        raise FileNotFoundError(
            f"{source} has no {REFERENCE}, so there is nothing to compare it with. save_sealed and publish write one; "
            "or name another form of the model to compare with (against=)."
        )
    found = _taken_afresh(root, expected["texts"], trust_remote_code, device)
    difference, name = max(_differences(expected, found))
    tolerance = max(1e-5, torch.finfo(getattr(torch, expected["dtype"])).eps)
    if not difference <= tolerance:
        causes = differing_settings(expected, found)
        causes |= {"prompts": "others"} if expected["prompts"] != found["prompts"] else {}
        if not causes and expected["dtype"] in ("float16", "bfloat16"):
            causes["precision"] = (
                "casting the LLM by itself also rounds what it computes from its config, such as rotary frequencies; "
                "cast the whole model (model.half(), model.bfloat16()) or load it with model_kwargs={'dtype': ...}"
            )
        listed = "; ".join(f"{setting}: {change}" for setting, change in causes.items())
        raise RuntimeError(
            f"{source} gives other vectors in a fresh process: they differ by {difference:.1e} under the prompt "
            f"{name!r}, and at most {tolerance:.0e} is rounding. Settings that differ: {listed or 'none'}."
        )
    return Checked(difference, _files(root))


def load_trusted(folder: str | Path, trust_remote_code: bool = False) -> SentenceTransformer:
    """Load a folder, running its code only if this package ships it, or if told to.

    Raises:
        FileNotFoundError: if it is no model folder.
        ValueError: if it names or links to something outside of it, holds pickles, or has unknown code.
    """
    root = Path(folder)
    demand_contained(root)
    if has_code(root) and not trust_remote_code:
        demand_known_code(root)
    return SentenceTransformer(str(root), trust_remote_code=has_code(root))


def demand_known_code(root: Path) -> None:
    """Check that whatever code loading ``root`` runs is a file that this package ships.

    Raises:
        ValueError: for other code, or a way to it: code of the LLM, or of the base of an adapter.
    """
    shipped = {_hash(file) for file in Path(reference.__file__).parent.glob("*.py")}
    installed = (STOCK, f"{__name__.partition('.')[0]}.")
    types = [entry["type"] for entry in read_json(root / "modules.json")]
    needed = {f"{name.rpartition('.')[0]}.py" for name in types if not name.startswith(installed)}
    needed |= {file.name for file in root.glob("*.py")}
    unknown = {name for name in needed if not (root / name).is_file() or _hash(root / name) not in shipped}
    unknown |= _leading_to_code(root)
    if (root / ADAPTER_CONFIG).is_file():
        base = read_json(root / ADAPTER_CONFIG)["base_model_name_or_path"]
        unknown |= {f"{base}: {name}" for name in _leading_to_code(_base_folder(root, base))}
    if unknown:
        raise ValueError(
            f"{root} runs code that this version of the package does not ship, by {sorted(unknown)}. Read it; then "
            "pass trust_remote_code=True (--trust-remote-code) to run it."
        )


def _leading_to_code(llm: Path) -> set[str]:
    """The files of an LLM's folder that name code of its own."""
    return {file.name for file in llm.glob("*.json") if '"auto_map"' in file.read_text(encoding="utf-8")}


def _base_folder(root: Path, base: str) -> Path:
    """Where the configuration of an adapter's base is: of one on the Hub, that much is downloaded."""
    if base == OWN_BASE:
        return root / base
    if Path(base).is_dir() or Path(base).is_absolute():
        return Path(base)
    revision = read_json(root / ADAPTER_CONFIG).get("revision")
    return Path(snapshot_download(base, revision=revision, allow_patterns="*.json"))


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _safe_folder(source: str | Path, revision: str | None, token: str | None) -> Path:
    if Path(source).is_dir():
        demand_contained(Path(source))
        return Path(source)
    root = Path(snapshot_download(str(source), revision=revision, token=token, ignore_patterns=[*PICKLES]))
    demand_contained(root, within=root.parents[1])  # the cache holds links into its blobs
    return root


def _taken_afresh(root: Path, texts: list[str], trust_remote_code: bool, device: str) -> dict[str, Any]:
    """``take_reference`` of a folder in a process without this package."""
    if has_code(root) and not trust_remote_code:
        demand_known_code(root)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "taken.json"
        hidden = __name__.partition(".")[0]
        trust = "trust" if has_code(root) else "stock"
        arguments = [str(root), device, trust, hidden, reference.__file__, str(out)]
        process = subprocess.run(
            # -I: neither PYTHONPATH nor the working directory can bring the package back.
            [sys.executable, "-I", "-c", FRESH_PROCESS, *arguments],
            input=json.dumps(list(texts)),
            capture_output=True,
            text=True,
            # Module code is cached by folder name: a cache of its own, so that no older copy answers.
            env={**os.environ, "HF_MODULES_CACHE": temporary, "HF_HUB_OFFLINE": "1"},
        )
        if process.returncode:
            raise RuntimeError(f"{root} does not load in a process without {hidden!r}:\n{process.stderr[-2000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def _differences(expected: dict[str, Any], found: dict[str, Any]) -> list[tuple[float, str]]:
    """The largest difference under each prompt; infinite for a prompt that is gone."""
    differences = []
    for name, vectors in expected["embeddings"].items():
        vectors, here = torch.tensor(vectors), torch.tensor(found["embeddings"].get(name, []))
        if here.shape == vectors.shape:
            differences.append(((here - vectors).abs().max().nan_to_num(torch.inf).item(), name))
        else:
            differences.append((torch.inf, name))
    return differences


def _files(root: Path) -> dict[str, int]:
    return {str(file.relative_to(root)): file.stat().st_size for file in sorted(root.rglob("*")) if file.is_file()}
