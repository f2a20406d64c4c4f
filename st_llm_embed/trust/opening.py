"""Open a folder or a Hub repository that was made elsewhere: fetch it, look through it, load it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base import BaseModel
from transformers import dynamic_module_utils

from st_llm_embed.files import PICKLES, read_json
from st_llm_embed.modules.adapters import OWN_BASE
from st_llm_embed.trust.code import MODULES, check_no_code
from st_llm_embed.trust.data import check_data

# By what config_sentence_transformers.json calls them; the first where it calls it nothing.
MODELS = {model.__name__: model for model in (SentenceTransformer, MultiVectorEncoder, SparseEncoder)}
MODELS["ColBERT"] = MultiVectorEncoder  # PyLate's name
# The same weights in formats that are not read here.
OTHER_FORMATS = ("onnx/*", "openvino/*", "*.onnx", "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.mlmodel")
# Of an adapter's base: what the loaders read.
OF_A_BASE = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def fetch(
    source: str | Path,
    revision: str | None = None,
    token: str | None = None,
    only: list[str] | None = None,
    *,
    pickles: bool = False,
) -> Path:
    """The folder ``source``, or where the Hub's repository of that name was downloaded to, looked through.

    Args:
        source: the folder, or the Hub id of the repository.
        revision: the branch, tag or commit of the repository.
        token: the Hub token.
        only: patterns of the files to download. Default: all but pickles and other formats of the weights.
        pickles: whether the folder may hold pickles of weights, for who reads them as tensors only.

    Raises:
        FileNotFoundError: for a path that is no folder.
        ValueError: see ``check_data``.
    """
    root = Path(source)
    if not root.is_dir():
        try:
            validate_repo_id(str(source))
        except HFValidationError as error:
            raise FileNotFoundError(f"There is no folder {source}, and no repository can be called so.") from error
        unread = None if only else [*PICKLES, *OTHER_FORMATS]
        root = Path(
            snapshot_download(
                str(source), revision=revision, token=token, allow_patterns=only or None, ignore_patterns=unread
            )
        )
    check_data(root, pickles=pickles)
    return root


def check_base(root: Path, trust_remote_code: bool, token: str | None = None, depth: int = 3) -> None:
    """Check the base of each adapter in ``root`` as ``root`` itself, and the base of that; of one on the Hub, what the
    loaders read is downloaded.

    Raises:
        ValueError: see ``check_data`` and ``check_no_code``; also for a base by a relative path, which is another
            folder for everybody, and for adapters on adapters without an end.
    """
    for file in root.rglob("adapter_config.json"):
        config = read_json(file)
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
        if not isinstance(base, str) or base in ("", OWN_BASE):
            continue  # it lies in the folder
        if Path(base).is_absolute() and not Path(base).exists():
            continue  # gone, as whoever looks for it will say
        if Path(base).exists() and not Path(base).is_absolute():
            raise ValueError(
                f"{file} names the base {base!r}, a folder by a relative path. Write its full path, or a Hub id."
            )
        if depth == 0:
            raise ValueError(f"{file} is an adapter on an adapter on an adapter. Merge them first.")
        base_root = fetch(base, revision, token, only=OF_A_BASE, pickles=True)
        check_no_code(base_root, trust_remote_code)
        check_base(base_root, trust_remote_code, token, depth - 1)


def model_class(root: Path) -> type[BaseModel]:
    """The class of the model in a folder: of one vector for a text, of several, or of sparse ones.

    Raises:
        ValueError: for another class, such as a cross-encoder.
    """
    file = root / "config_sentence_transformers.json"
    name = read_json(file).get("model_type", SentenceTransformer.__name__) if file.is_file() else ""
    if name == "":
        return SentenceTransformer
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(f"{file} has model_type={name!r}, and this opens {', '.join(MODELS)}.")
    return MODELS[name]


def load_trusted(folder: str | Path, trust_remote_code: bool = False, **kwargs: Any) -> SentenceTransformer:
    """``load_any`` of a model of one dense vector for a text.

    Raises:
        ValueError: for a model of several vectors or of sparse ones; and see ``load_any``.
    """
    root = fetch(folder)
    if (kind := model_class(root)) is not SentenceTransformer:
        raise ValueError(
            f"{folder} is a {kind.__name__}, and this takes models of one dense vector for a text. A "
            f"{kind.__name__} can be trained, averaged, merged, sealed, checked, published and evaluated here; it "
            f"encodes by sentence_transformers.{kind.__name__}."
        )
    return load_any(root, trust_remote_code, **kwargs)


def load_any(folder: str | Path, trust_remote_code: bool = False, **kwargs: Any) -> BaseModel:
    """Load a folder and encode some words, running code of its own only if told to. The classes that this package
    ships are the installed ones.

    Args:
        folder: the folder of a model that sentence-transformers saved, or of an LLM.
        trust_remote_code: whether to run the code in it.
        **kwargs: the further arguments of the model's class.

    Raises:
        ValueError: for code without consent, a folder that does not hold data alone, or one that cannot be loaded.
    """
    root = fetch(folder)
    model_of = model_class(root)
    if not any((root / name).is_file() for name in ("modules.json", "config.json", "adapter_config.json")):
        held = sorted(str(file.parent) for file in root.glob("*/*/modules.json"))
        hint = f" There are: {', '.join(held)}." if held else ""
        raise ValueError(f"{root} holds no model: it has neither a modules.json nor a config.json.{hint}")
    unknown = check_no_code(root, trust_remote_code)
    check_base(root, trust_remote_code)
    with loading(root):
        if unknown:
            model = model_of(str(root), trust_remote_code=True, **kwargs)
        else:
            model = model_of._load_with_module_classes(str(root), MODULES, **kwargs)
        # Much that is wrong in a folder shows here first; of two lengths, for one is padded.
        model.encode(["word", "and several more words"], show_progress_bar=False)
    return model


@contextmanager
def loading(root: str | Path) -> Iterator[None]:
    """Name ``root`` in the hosts' errors, which name no file where one holds what they do not expect; and let nobody
    be asked on standard input."""
    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE  # to answer in
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of tokenizers, in Rust
            raise
        for kind in (OSError, ImportError, RuntimeError, ValueError):
            if isinstance(error, kind):
                raise kind(f"{root} cannot be loaded: {error}") from error
        raise ValueError(f"{root} cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds
