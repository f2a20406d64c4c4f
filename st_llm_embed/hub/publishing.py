"""From a model in memory to a folder or a Hub repository that loads anywhere, checked before anybody sees it.

save_pretrained -> seal -> reference vectors -> card -> check in a fresh process -> rename into place, or upload

Nothing reaches its target that failed on the way there.
"""

from __future__ import annotations

import glob
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, metadata_load
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from sentence_transformers.base import BaseModel

from st_llm_embed.encoding.encoder import ModelEncoder
from st_llm_embed.encoding.manifest import space_of
from st_llm_embed.encoding.ranges import RANGES, read_ranges
from st_llm_embed.files import check_empty, check_room, files_of, read_json, size_of, write_json, written_beside
from st_llm_embed.hub.card import finish_card, inherit_license
from st_llm_embed.hub.checking import compare
from st_llm_embed.hub.sealing import seal
from st_llm_embed.hub.teacher import REFERENCE, TeacherName
from st_llm_embed.modules.adapters import ADAPTER_CONFIG, OWN_BASE
from st_llm_embed.modules.reference import take_reference
from st_llm_embed.trust import check_model, forget_code, has_code
from st_llm_embed.weights.merging import has_adapter, merge_adapter

logger = logging.getLogger(__name__)
ADAPTERS = ("merge", "only")
FILE_LIMIT = 50_000_000_000  # bytes; what the Hub takes in one file
# What a sealed folder holds. Anything else in it came there otherwise, and may be nobody's business.
UPLOADED = (
    *("*.json", "*.safetensors", "*.py", "*.jinja", "README.md", "LICENSE*", "NOTICE*"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "merges.txt"),
)
NOT_UPLOADED = ("trainer_state.json",)


def save_sealed(
    model: BaseModel,
    folder: str | Path,
    card_section: str = "",
    *,
    samples: bool = False,
    teacher: TeacherName | None = None,
    ranges: Path | None = None,
) -> Path:
    """Write ``model`` as a folder that loads without this package, checked by loading it so.

    Everything happens in a temporary folder beside the target, which is renamed at the end: an error or an
    interruption leaves no half-written model. A model with a peft adapter is written as the adapter alone.

    Args:
        model: the model to write.
        folder: the folder to write; must not exist, or be empty.
        card_section: Markdown for the model card, after what the package itself says of the model.
        samples: whether the card keeps the rows of the training data that sentence-transformers shows in it. What is
            published cannot be taken back, so by default they are left out.
        teacher: the model whose space the vectors are in, for ``reference.json`` and the card.
        ranges: the file of the ranges of int8 that lies beside the weights, as ``evaluate_compressed`` wrote it.

    Returns:
        The folder.

    Raises:
        FileExistsError: if ``folder`` holds something.
        OSError: if ``folder`` cannot be written, or its disk has no room for the model.
        ValueError: if the model is quantised, its weights are not there, or the ranges are another model's.
        RuntimeError: if the fresh process cannot load it or gives other vectors.
    """
    target = Path(folder).resolve()
    check_empty(target)
    _check_weights(model)
    check_room(target, size_of(model))
    if ranges is not None:
        read_ranges(ranges, space_of(ModelEncoder(model)))
    inherit_license(model)
    with written_beside(target) as staged:
        model.save_pretrained(str(staged))
        seal(staged)
        if ranges is not None:
            shutil.copy(ranges, staged / RANGES)
        write_json(staged / REFERENCE, take_reference(model) | ({"teacher": teacher._asdict()} if teacher else {}))
        card_section = (teacher.section if teacher else "") + card_section
        finish_card(staged / "README.md", model, card_section, has_code(staged), samples)
        foreign = _runs_code_of_its_llm(model)
        if not foreign:
            _forget_unused_code(staged)
        # What seal put there ran in this process. Else nothing is to run, whatever a base or a configuration names.
        compare(staged, known=not foreign, device=str(model.device))
    return target


def _runs_code_of_its_llm(model: BaseModel) -> bool:
    """Is the LLM, or the tokenizer, of a class that its repository brought?"""
    llm = model.transformers_model
    parts = [model.tokenizer] if llm is None else [llm, llm.config, model.tokenizer]
    return any(type(part).__module__.startswith("transformers_modules") for part in parts)


def _forget_unused_code(folder: Path) -> None:
    """Drop ``auto_map`` from a folder whose classes are transformers' own: who loads it with trust would run it."""
    for file in folder.rglob("*.json"):
        if '"auto_map"' in file.read_text(encoding="utf-8"):
            forget_code(file)


def publish(
    model: BaseModel,
    repo_id: str,
    *,
    adapter: str | None = None,
    private: bool | None = None,
    exist_ok: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Add text-embedding model",
    card_section: str = "",
    samples: bool = False,
    teacher: TeacherName | None = None,
    ranges: Path | None = None,
) -> str:
    """Push ``model`` to the Hugging Face Hub, sealed and checked, so that it loads on machines without this package.

    Args:
        model: the model to publish.
        repo_id: the name of the repository, ``"organisation/name"``. Created if it does not exist.
        adapter: what becomes of a model's peft adapter: ``"merge"`` merges it into a copy of the LLM, ``"only"``
            publishes it alone, to be loaded on top of its base.
        private: whether a new repository is private. Default: the organisation's.
        exist_ok: whether to replace what the repository holds. (It stays in the history.)
        create_pr: whether to open a pull request instead of a commit.
        revision: the branch to commit to, made if it is not there. Default: ``main``.
        token: the Hub token. Default: the one saved by ``hf auth login``.
        commit_message: the first line of the commit's message.
        card_section: Markdown for the model card, after what the package itself says of the model.
        samples, teacher, ranges: see ``save_sealed``.

    Returns:
        The URL of the commit, or of the pull request; of the last commit where the repository holds all this already.

    Raises:
        ValueError: if ``repo_id`` is not a valid repository name, ``adapter`` does not fit the model, the model is
            quantised or its weights are not there, or a file is larger than the Hub takes.
        FileExistsError: if the repository holds something.
        PermissionError: without a token that may write there.
        ConnectionError: if the upload fails otherwise.
        RuntimeError: if the saved folder fails its check; nothing is uploaded then.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is not a valid name such as 'organisation/name': {error}") from error
    _check_weights(model)
    _check_choice(model, adapter)
    if adapter == "only":
        for config in model.transformers_model.peft_config.values():
            _check_reachable(config.base_model_name_or_path)
    if not (exist_ok or create_pr):
        _check_free(HfApi(token=token), repo_id, revision)  # before the work, not only after it
    if adapter == "merge":
        model = merge_adapter(model)
    model.model_card_data.set_model_id(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / repo_id.rpartition("/")[2]
        folder = save_sealed(model, target, card_section, samples=samples, teacher=teacher, ranges=ranges)
        if "license" not in (metadata_load(folder / "README.md") or {}):
            logger.warning(
                f"The card of {repo_id!r} names no licence, so nobody may use the model. Add "
                "model.model_card_data.set_license('apache-2.0'), or another that its base and its data allow, and "
                "publish it again."
            )
        return upload(
            folder,
            repo_id,
            private=private,
            exist_ok=exist_ok,
            create_pr=create_pr,
            revision=revision,
            token=token,
            commit_message=commit_message,
        )


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    exist_ok: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Add text-embedding model",
) -> str:
    """Upload a folder that ``save_sealed`` wrote and checked, in one commit: a repository never holds half of it.

    What does not belong to a model, such as hidden files, checkpoints and notes, stays, and is named.

    Args and errors are those of ``publish``.
    """
    check_model(Path(folder))
    check_uploadable(Path(folder))
    paths = _uploaded(Path(folder))
    hub = HfApi(token=token)
    if not (exist_ok or create_pr):
        _check_free(hub, repo_id, revision)
    with _upload_errors(repo_id):
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            allow_patterns=[glob.escape(path) for path in paths],
            delete_patterns="*",  # an adapter or a shard of an earlier version would be loaded along
        )
    return commit.pr_url or commit.commit_url  # of no change, huggingface_hub opens no pull request


def _uploaded(folder: Path) -> list[str]:
    files = files_of(folder)
    sent = [
        file
        for file in files
        if any(file.match(pattern) for pattern in UPLOADED) and not any(file.match(name) for name in NOT_UPLOADED)
    ]
    if left := sorted({str(file.parts[0]) for file in files if file not in sent}):
        logger.warning(f"Of {folder} these stay, as no part of a model: {', '.join(map(repr, left))}.")
    return [file.as_posix() for file in sent]


def check_uploadable(folder: Path) -> None:
    """Check that the Hub takes every file, and that an adapter's base is there too.

    Raises:
        ValueError: naming the files over the limit, or the base that is a folder of this machine.
    """
    large = {file.name: file.stat().st_size for file in folder.rglob("*") if file.stat().st_size > FILE_LIMIT}
    if large:
        raise ValueError(
            f"The Hub takes files of at most {FILE_LIMIT / 1e9:.0f} GB, and {large} are larger (in bytes). Save the "
            "model in half precision, or in smaller shards."
        )
    if (config := folder / ADAPTER_CONFIG).is_file():
        _check_reachable(read_json(config)["base_model_name_or_path"])


def _check_reachable(base: str) -> None:
    if base and base != OWN_BASE and Path(base).exists():
        raise ValueError(
            f"The adapter's base is {base!r}, a folder of this machine, so nobody else could load it. Publish it "
            "with adapter='merge', or train it on a base from the Hub."
        )


def _check_weights(model: BaseModel) -> None:
    if empty := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(
            f"{len(empty)} weights, {empty[0]!r} among them, are on the meta device: there is nothing to save. Load "
            "the model without device_map or torch.device('meta')."
        )
    if model.transformers_model.config.to_dict().get("quantization_config"):
        raise ValueError(
            "The model is quantised, and what it would be saved as gives other vectors elsewhere. Load it without "
            "quantization_config, and publish that."
        )


def _check_choice(model: BaseModel, adapter: str | None) -> None:
    if adapter is not None and adapter not in ADAPTERS:
        raise ValueError(f"adapter={adapter!r} is unknown. Valid values: {', '.join(ADAPTERS)}.")
    if has_adapter(model) and adapter is None:
        raise ValueError(
            "The model has an adapter. Choose adapter='merge' (--adapter merge: a model as large as its base, which "
            "loads without peft) or adapter='only' (--adapter only: small; its base is downloaded along with it)."
        )
    if adapter is not None and not has_adapter(model):
        raise ValueError(f"adapter={adapter!r}, but the model has no adapter. Leave it out.")


def _check_free(hub: HfApi, repo_id: str, revision: str | None) -> None:
    """An empty repository is free: an upload that was broken off leaves one. So is a branch that is not there yet."""
    with _upload_errors(repo_id):
        try:
            held = set(hub.list_repo_files(repo_id, revision=revision)) - {".gitattributes"}
        except RevisionNotFoundError:
            return
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401:  # also what a wrong token gets
                raise
            return
    if held:
        place = f" on the branch {revision!r}" if revision else ""
        raise FileExistsError(
            f"The repository {repo_id!r} exists and holds {len(held)} files{place}. Choose another name; or replace "
            "them with exist_ok=True (--exist-ok), or propose it with create_pr=True (--create-pr)."
        )


@contextmanager
def _upload_errors(repo_id: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, AttributeError, LookupError, NameError):  # a bug, and no fault of the network
        raise
    except Exception as error:  # of huggingface_hub, of its HTTP client, of the network
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise PermissionError(
                f"The Hub does not let this token write to {repo_id!r}. Log in by `hf auth login` with a token that "
                f"may, or give one (token=). ({error})"
            ) from error
        raise ConnectionError(
            f"The upload to {repo_id!r} failed. Files that arrived are not sent again: repeat it. ({error!r})"
        ) from error
