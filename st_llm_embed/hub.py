"""From a model in memory to a repository that loads anywhere: save, seal, check, upload.

sentence-transformers saves a module of an installed package by its dotted name, which loads only where that package is
installed. ``seal`` turns such references into files of the repository, or, where stock modules do the same, into stock
modules, which need no ``trust_remote_code``. ``check`` proves it: a fresh process that cannot import this package
loads the folder and gives the same vectors. Nothing reaches its target before that.

Works on folders only, and never on a trainer's ``checkpoint-*``: the trainer finds its best checkpoint by the dotted
names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from sentence_transformers import SentenceTransformer
from transformers.dynamic_module_utils import get_relative_import_files

STOCK = "sentence_transformers."
STOCK_BACKBONE = "sentence_transformers.base.modules.transformer.Transformer"
BACKBONE = "LLMBackbone"
# Their effect is in config.json and tokenizer.json, or there is none without the backbone's code.
BACKBONE_KEYS = ("attention", "window", "add_eos", "instruction_mask", "probe", "num_layers")
REQUIREMENTS = {
    "sentence-transformers": {"specifier": ">=6.0", "reason": "the module interface that the saved files use"},
    "transformers": {"specifier": ">=5.2", "reason": "older versions ignore is_causal=false and attend causally"},
}
CHECK_TEXTS = ["How do I parse command line arguments?", "naïve café — 日本語", "word " * 300]
FRESH_PROCESS = """
import sys
for name in sys.argv[4].split(","):
    sys.modules[name] = None  # importing it now fails
import json, numpy
from sentence_transformers import SentenceTransformer
folder, device, out = sys.argv[1:4]
model = SentenceTransformer(folder, device=device, trust_remote_code=sys.argv[5] == "remote", local_files_only=True)
texts = json.loads(sys.stdin.read())
numpy.savez(out, **{name: model.encode(texts, prompt=prompt) for name, prompt in model.prompts.items()})
"""


def save_sealed(model: SentenceTransformer, folder: str | Path, card_section: str = "") -> Path:
    """Write ``model`` as a folder that loads without this package, checked by loading it so.

    Everything happens in a temporary folder beside the target, which is renamed at the end: an error or an
    interruption leaves no half-written model.

    Args:
        model: the model to write.
        folder: must not exist, or be empty.
        card_section: Markdown for the model card, before its details.

    Returns:
        The folder.

    Raises:
        FileExistsError: if ``folder`` holds something.
        OSError: if the disk has no room for it.
        RuntimeError: if the fresh process cannot load it or gives other vectors.
    """
    target = Path(folder).resolve()
    demand_empty(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    demand_room(target.parent, model)
    with written_beside(target) as staged:
        model.save_pretrained(str(staged))
        seal(staged)
        _finish_card(staged, card_section)
        check(staged, model)
    return target


def publish(
    model: SentenceTransformer,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Add text-embedding model",
    card_section: str = "",
) -> str:
    """Push ``model`` to the Hugging Face Hub, sealed and checked, so that it loads on machines without this package.

    Args:
        model: the model to publish.
        repo_id: ``"organisation/name"``. Created if it does not exist.
        private: whether a new repository is private. Default: the organisation's.
        token: Hub token. Default: the one saved by ``hf auth login``.
        revision: the branch to commit to. Default: ``main``.
        commit_message: of the commit.
        card_section: Markdown for the model card, before its details.

    Returns:
        The commit's URL.

    Raises:
        ValueError: if ``repo_id`` is not a valid repository name.
        RuntimeError: if the saved folder fails its check; nothing is uploaded then.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is not a valid name such as 'organisation/name': {error}") from error
    model.model_card_data.set_model_id(repo_id)
    hub = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_sealed(model, Path(temporary) / repo_id.rpartition("/")[2], card_section)
        hub.create_repo(repo_id, private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return commit.commit_url


def seal(folder: str | Path) -> None:
    """Make a saved model folder independent of the packages that its modules come from. Sealing twice changes nothing.

    Raises:
        FileNotFoundError: if it is not a folder that sentence-transformers saved.
        ValueError: if a module's class cannot be found to copy its source.
    """
    root = Path(folder)
    modules = _read_json(root / "modules.json")
    if _is_stock_in_effect(root, modules):
        modules[0]["type"] = STOCK_BACKBONE
        settings = _read_json(root / "sentence_bert_config.json")
        _write_json(root / "sentence_bert_config.json", {k: v for k, v in settings.items() if k not in BACKBONE_KEYS})
    for entry in modules:
        if not entry["type"].startswith(STOCK):
            entry["type"] = _ship_source(root, entry["type"])
    _write_json(root / "modules.json", modules)
    config = _read_json(root / "config_sentence_transformers.json")
    _write_json(root / "config_sentence_transformers.json", {**config, "requirements": REQUIREMENTS})


def _is_stock_in_effect(root: Path, modules: list[dict]) -> bool:
    """Would sentence-transformers' own Transformer do what the saved LLMBackbone does?

    The mode is in config.json and EOS in tokenizer.json. What stock lacks is the part of a prompt after the text, and
    the exact instruction mask, which only a pooling that leaves the prompt out reads; and an adapter alone comes with
    its base model's config.json, which knows nothing of the mode.
    """
    backbone, *others = modules
    prompts = _read_json(root / "config_sentence_transformers.json")["prompts"]
    settings = _read_json(root / "sentence_bert_config.json")
    return (
        backbone["type"].rpartition(".")[2] == BACKBONE
        and not (root / "adapter_config.json").is_file()
        and all(entry["type"].startswith(STOCK) for entry in others)
        and (settings["attention"] == "causal" or not _read_json(root / "config.json").get("is_causal", True))
        and settings["add_eos"] != "nv-embed"
        and not any("{text}" in prompt for prompt in prompts.values())
        and all(_read_json(config).get("include_prompt", True) for config in root.glob("[0-9]*_*/config.json"))
    )


def _ship_source(root: Path, reference: str) -> str:
    """Copy the source of ``package.module.Class``, and the siblings it imports, to the root; give ``module.Class``."""
    module, _, name = reference.rpartition(".")
    if (root / f"{module}.py").is_file():  # sealed already
        return reference
    spec = importlib.util.find_spec(module) if module else None
    if spec is None or spec.origin is None:
        raise ValueError(
            f"The module class {reference!r} cannot be imported here, so its source cannot be shipped. Install the "
            "package it comes from, then seal the folder again."
        )
    for source in (spec.origin, *get_relative_import_files(spec.origin)):
        shutil.copy(source, root / Path(source).name)
    return f"{module.rpartition('.')[2]}.{name}"


def check(folder: str | Path, model: SentenceTransformer) -> float:
    """Load ``folder`` in a fresh process that cannot import this package, and compare its vectors with ``model``'s.

    Returns:
        The largest difference of any component, over a few texts under every saved prompt.

    Raises:
        RuntimeError: if it does not load, or a component differs by more than 1e-5 (or, in half
            precision, by its last bit).
    """
    remote = _has_code(Path(folder))
    with tempfile.TemporaryDirectory() as temporary:
        vectors = Path(temporary) / "vectors.npz"
        hidden = __name__.partition(".")[0]
        arguments = [str(folder), str(model.device), str(vectors), hidden, "remote" if remote else "stock"]
        process = subprocess.run(
            # -I: neither PYTHONPATH nor the working directory can bring the package back.
            [sys.executable, "-I", "-c", FRESH_PROCESS, *arguments],
            input=json.dumps(CHECK_TEXTS),
            capture_output=True,
            text=True,
            # Module code is cached by folder name: a cache of its own, so that no older copy answers.
            env={**os.environ, "HF_MODULES_CACHE": temporary, "HF_HUB_OFFLINE": "1"},
        )
        if process.returncode:
            raise RuntimeError(f"{folder} does not load in a process without {hidden!r}:\n{process.stderr[-2000:]}")
        with np.load(vectors) as loaded:
            differences = {
                name: float(np.abs(loaded[name] - model.encode(CHECK_TEXTS, prompt=prompt)).max())
                for name, prompt in model.prompts.items()
            }
    worst = max(differences, key=differences.get)
    tolerance = max(1e-5, torch.finfo(model.dtype).eps)
    if not differences[worst] <= tolerance:
        raise RuntimeError(
            f"{folder} gives other vectors in a fresh process: they differ by {differences[worst]:.1e} under the "
            f"prompt {worst!r}, and at most {tolerance:.0e} is rounding."
        )
    return differences[worst]


def demand_empty(folder: Path) -> None:
    """Raise FileExistsError if ``folder`` is there and holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder. Choose another, or remove it first.")


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``target`` at the end: an error or an interruption leaves nothing of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        staged = Path(temporary) / target.name
        yield staged
        if target.is_dir():
            target.rmdir()
        staged.rename(target)


def demand_room(folder: Path, model: SentenceTransformer) -> None:
    """Raise OSError if the disk of ``folder`` has no room for ``model``'s weights and a tenth more."""
    needed = 1.1 * sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(
            f"{folder} has {free / 1e6:,.0f} MB free, and the model needs {needed / 1e6:,.0f} MB. Make room, or "
            "choose another folder."
        )


def _has_code(root: Path) -> bool:
    """Does loading this folder run module code of its own?"""
    return any(not entry["type"].startswith(STOCK) for entry in _read_json(root / "modules.json"))


def _finish_card(root: Path, section: str) -> None:
    """Put ``section`` before the host's model card's details, and make the card's own snippet one that loads."""
    card = root / "README.md"
    head, heading, details = card.read_text(encoding="utf-8").partition("## Model Details")
    if _has_code(root):
        details = re.sub(r'(SentenceTransformer\("[^"]+")\)', r"\1, trust_remote_code=True)", details)
    section = f"{section.strip()}\n\n" if section else ""
    card.write_text(head + section + heading + details, encoding="utf-8")


def _read_json(file: Path) -> dict | list:
    return json.loads(file.read_text(encoding="utf-8"))


def _write_json(file: Path, content: dict | list) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=isinstance(content, dict)) + "\n", encoding="utf-8")
