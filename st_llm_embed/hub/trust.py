"""The one gate for folders and repositories that were made elsewhere: fetch, look, load.

A model folder is data, and what it names can be code: a class in ``modules.json``, an ``auto_map`` in any
configuration, an activation, a kernel of the Hub. ``code_in`` reads each file as the loaders do, at every depth, and
names what they would run. Nothing of it runs unless the caller says so.

Promised, of ``check``, ``evaluate``, ``merge``, ``average``, ``export``, ``publish``, ``convert``, ``mine``, ``train``
and ``build_model``: no code of a model, an adapter, its base or a teacher runs without consent, and none is asked for
on standard input; nothing is read that a folder names outside of it; a file made to hurt ends in one message. Classes
whose files this package ships with models are known by hash: the installed ones stand in for them, and the hosts are
told ``trust_remote_code=False`` even then.

Not promised: faults of memory in torch, tokenizers, safetensors and other native code; data sets whose builder is a
script; a short time for a large model; anything once consent is given. A way around it is best reported as a security
advisory of the repository, before it is public.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import import_from_string
from transformers import dynamic_module_utils

from st_llm_embed.modules import LatentAttentionPooling, LLMBackbone, PromptTokenPooling, reference
from st_llm_embed.modules.adapters import OWN_BASE

STOCK = "sentence_transformers."
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")  # reading them may run code
# What a trainer leaves beside a model, and what loading the model never reads.
LEFT_BY_TRAINERS = (
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
)
# The same weights in formats that are not read here.
OTHER_FORMATS = ("onnx/*", "openvino/*", "*.onnx", "*.gguf", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.mlmodel")
# Of an adapter's base: what the loaders read.
OF_A_BASE = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# What the loaders read; of other files, what is not JSON is nothing to them either.
CONFIGURATIONS = ("*config*.json", "modules.json", "*.index.json", "special_tokens_map.json", "added_tokens.json")
VOCABULARIES = ("tokenizer.json", "vocab.json")  # which name no code, and are large

# What no honest folder comes near.
MOST_FILES = 20_000
MOST_LAYERS = 2_000
FEW_LAYERS = 200  # several may share their weights
MOST_PROMPTS = 1_000
LONGEST_PATTERN = 1_000  # characters of an adapter's regular expression
MOST_TOKENS = 200_000  # to pad texts to
LARGEST_SIZE = 300_000  # of a vocabulary, say, where no tensor is as large
DEPTH = re.compile(r"layers?(_replication)?$|depths?$|blocks?$")
SIZE = re.compile(r"(size|dim|dimension|features|latents|heads|experts|channels|width|rank|embd|inner)s?$|^(r|d_\w+)$")
NO_SIZE = re.compile(r"position|length|window|batch|chunk|block|kernel|patch|image|shard|cache|total|sample|group")
LARGEST_CONFIGURATION = 1 << 26  # bytes

MODULES = {
    name: module
    for module in (LLMBackbone, LatentAttentionPooling, PromptTokenPooling)
    for name in (
        f"{module.__module__}.{module.__name__}",  # not sealed
        f"{module.__module__.rpartition('.')[2]}.{module.__name__}",
    )
}
# Of sentence-transformers' own those that load what is in their folder, and nothing else.
STOCK_MODULES = set(
    "Transformer Pooling Normalize Dense LayerNorm Dropout WeightedLayerPooling Router Asym StaticEmbedding BoW "
    "WordEmbeddings WordWeights CNN LSTM CLIPModel".split()
)
STOCK_TOKENIZERS = {"WhitespaceTokenizer", "PhraseTokenizer"}
ADAPTERS = {"LORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "HRA"}
# SHA-256 of what released versions shipped with models.
RELEASED = {
    "712c2cb8369bcfca1cd0f752198e97e47320c8e921f4bdb210ddfa547c598288": "attention_mode.py of 0.1.0",
    "0f31f4df51b57a52173dc0ae321cb627f546ec677b5d4e2060b7348c827f57c4": "latent_attention_pooling.py of 0.1.0",
    "1b5c350e682262c0a59aaccb6ab740fef08270c0de84df5f1b48f462f1465714": "llm_backbone.py of 0.1.0",
    "dffd82fa18279808bcd3f2aabcacb88ea644d389fa292fb5b0c1bb8409dcfe00": "prompt_token_pooling.py of 0.1.0",
}
# What sentence-transformers hands from its configurations to the loaders of transformers, and what may be in it.
HANDED_ON = ("model_kwargs", "processor_kwargs", "config_kwargs", "model_args", "tokenizer_args", "config_args")
HARMLESS = {
    *("use_cache", "is_causal", "add_pooling_layer", "low_cpu_mem_usage", "legacy", "use_fast", "do_lower_case"),
    *("add_bos_token", "add_eos_token", "add_prefix_space", "max_length", "model_max_length"),
    "clean_up_tokenization_spaces",
    *("attn_implementation", "dtype", "torch_dtype", "padding", "padding_side", "truncation", "truncation_side"),
    *(f"{kind}_token" for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")),
}


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
        source: a folder, or a Hub id.
        revision: branch, tag or commit of a Hub id.
        token: Hub token.
        only: patterns of the files to download. Default: all but pickles and other formats of the weights.
        pickles: whether there may be some, for who reads them as tensors only.

    Raises:
        ValueError: see ``demand_data``.
    """
    root = Path(source)
    if not root.is_dir():
        unread = [*PICKLES, *OTHER_FORMATS]
        options = {"allow_patterns": only} if only else {"ignore_patterns": unread}
        root = Path(snapshot_download(str(source), revision=revision, token=token, **options))
    demand_data(root, pickles=pickles)
    return root


def demand_data(root: Path, *, pickles: bool = False) -> None:
    """Check that a folder holds data alone, in files that can be read: whatever they name is another question.

    Raises:
        ValueError: for what is neither a file nor a folder, a link or a name that leads out of the folder, a pickle
            of weights, a configuration that is none, and sizes that no model has.
    """
    homes = [root.resolve()]
    if root.resolve().parent.name == "snapshots":  # of the Hub's cache, whose files are links
        homes.append(root.resolve().parents[1] / "blobs")
    files = []
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(folder, name)
            if path.is_symlink():
                _demand_inside_link(path, homes)
            mode = path.stat().st_mode
            if stat.S_ISREG(mode):
                files.append(path)
            elif not stat.S_ISDIR(mode):
                raise ValueError(f"{str(path)!r} is no regular file, so reading it may never end. Remove it.")
        if len(files) > MOST_FILES:
            raise ValueError(f"{root} holds more than {MOST_FILES:,} files, which no model does.")
    if not pickles:
        _demand_no_pickles(root, files)
    tensors, largest = _measure_tensors(files)
    for file, content in _configurations(files):
        if file.name == "modules.json":
            _demand_modules(file, content)
        elif file.name.endswith(".index.json"):
            _demand_index(file, content)
        elif not isinstance(content, dict):
            raise ValueError(f"{file} is no JSON object.")
        _demand_sizes(file, content, tensors, largest)


def demand_model(root: Path) -> None:
    """Check that a folder is one that sentence-transformers saved, and holds data alone.

    Raises:
        FileNotFoundError: if it has no modules.json.
        ValueError: see ``demand_data``.
    """
    demand_saved(root)
    demand_data(root)


def demand_saved(root: Path) -> None:
    """
    Raises:
        FileNotFoundError: if ``root`` has no modules.json.
    """
    if not (root / "modules.json").is_file():
        raise FileNotFoundError(f"{root} is not a folder that sentence-transformers saved: it has no modules.json.")


def code_in(root: Path) -> dict[str, str]:
    """What loading ``root`` would run, besides the hosts and this package: the reason, by file.

    Without consent the hosts refuse or pass over some of it; another reader who gives them
    ``trust_remote_code=True``, as a folder with classes of its own asks for, would run all of it.
    """
    found: dict[str, str] = {}
    files = [file for file in root.rglob("*") if file.is_file()]
    contents = dict(_configurations(files))
    own = has_code(root)
    for entry in contents.get(root / "modules.json", []):
        if reason := _unknown_class(root, entry["type"]):
            found["modules.json"] = reason
    if own:
        known = _known_files(with_released="adapter_config.json" not in {file.name for file in files})
        unknown = [file.name for file in root.glob("*.py") if _hash(file) not in known]
        found |= dict.fromkeys(unknown, "it is not a file that this package ships")
    for file, content in contents.items():
        name = str(file.relative_to(root))
        for reason in _named_code(file.name, content, own):
            found.setdefault(name, reason)
    return found


def demand_no_code(root: Path, trust_remote_code: bool) -> bool:
    """Check that loading ``root`` runs no code that is not known, or that the caller consents to it.

    Returns:
        Whether there is such code.

    Raises:
        ValueError: naming the files and the reasons.
    """
    found = code_in(root)
    if found and not trust_remote_code:
        listed = "; ".join(f"{name!r}: {reason}" for name, reason in sorted(found.items()))
        raise ValueError(
            f"{root} runs code that this version of the package does not ship. {listed}. Read it; then pass "
            "trust_remote_code=True (--trust-remote-code) to run it."
        )
    return bool(found)


def demand_base(root: Path, trust_remote_code: bool, token: str | None = None, depth: int = 3) -> None:
    """Check the base of each adapter in ``root`` as ``root`` itself, and the base of that; of one on the Hub, what the
    loaders read is downloaded.

    Raises:
        ValueError: see ``demand_data`` and ``demand_no_code``; also for a base by a relative path, which is another
            folder for everybody, and for adapters on adapters without an end.
    """
    for file in root.rglob("adapter_config.json"):
        saved = read_json(file)
        base, revision = saved.get("base_model_name_or_path"), saved.get("revision")
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
        there = fetch(base, revision, token, only=OF_A_BASE, pickles=True)
        demand_no_code(there, trust_remote_code)
        demand_base(there, trust_remote_code, token, depth - 1)


def load_trusted(folder: str | Path, trust_remote_code: bool = False, **kwargs: Any) -> SentenceTransformer:
    """Load a folder and encode some words, running code of its own only if told to. The classes that this package
    ships are the installed ones.

    Args:
        folder: one that sentence-transformers saved, or of an LLM.
        trust_remote_code: run the code in it.
        **kwargs: of ``SentenceTransformer``.

    Raises:
        ValueError: for code without consent, a folder that does not hold data alone, or one that cannot be loaded.
    """
    root = fetch(folder)
    unknown = demand_no_code(root, trust_remote_code)
    demand_base(root, trust_remote_code)
    with loading(root):
        if unknown:
            model = SentenceTransformer(str(root), trust_remote_code=True, **kwargs)
        else:
            model = SentenceTransformer._load_with_module_classes(str(root), MODULES, **kwargs)
        # Much that is wrong in a folder shows here first; of two lengths, for one is padded.
        model.encode(["word", "and several more words"], show_progress_bar=False)
    return model


@contextmanager
def loading(root: str | Path) -> Iterator[None]:
    """Say of what the hosts' errors are, as those of a file with something else in it than they expect name no file;
    and let nobody be asked on standard input."""
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


def files_of(root: Path) -> list[Path]:
    """The files of a model, by their path in its folder: not those of checkpoints, nor hidden ones."""
    found = []
    for folder, folders, names in os.walk(root):
        inside = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if not name.startswith((".", "checkpoint-"))]
        found += [inside / name for name in names if not name.startswith(".")]
    return sorted(found)


def has_code(root: Path) -> bool:
    """Does loading this folder run module code of its own? One without modules.json gets the host's."""
    file = root / "modules.json"
    return file.is_file() and any(not entry["type"].startswith(STOCK) for entry in read_json(file))


def left_by_trainer(file: Path) -> bool:
    """Is ``file`` a pickle that a trainer left beside a model?"""
    return any(file.match(name) for name in LEFT_BY_TRAINERS)


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: naming the file that is not JSON, is nested too deeply, or is too large to be a configuration.
    """
    if file.stat().st_size > LARGEST_CONFIGURATION:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, which no configuration has.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply to be read.") from error
    except ValueError as error:  # of its JSON, its encoding, a number of thousands of digits
        raise ValueError(f"{file} is not JSON: {error}.") from error


def without_code(content: Any) -> Any:
    """A configuration without what names the code of its LLM or tokenizer."""
    if isinstance(content, dict):
        return {key: without_code(value) for key, value in content.items() if key != "auto_map"}
    return [without_code(value) for value in content] if isinstance(content, list) else content


def _configurations(files: list[Path]) -> Iterator[tuple[Path, Any]]:
    for file in files:
        if file.suffix == ".json" and file.name not in VOCABULARIES:
            try:
                yield file, read_json(file)
            except ValueError:
                if any(file.match(pattern) for pattern in CONFIGURATIONS):
                    raise


def _demand_inside_link(path: Path, homes: list[Path]) -> None:
    try:
        to = path.resolve(strict=True)
        inside = to.is_file() and any(to.is_relative_to(home) for home in homes)
    except (OSError, RuntimeError):  # to nothing, or to itself
        inside = False
    if not inside:
        raise ValueError(
            f"{str(path)!r} is one of the links that lead out of the folder, to another, or to nothing. Put what it "
            "points to in its place, or remove it."
        )


def _demand_no_pickles(root: Path, files: list[Path]) -> None:
    """Pickles of weights that a loader might read; not those beside safetensors, which all loaders prefer."""
    safe = {file.parent for file in files if file.suffix == ".safetensors"}
    pickles = [file for file in files if any(file.match(pattern) for pattern in PICKLES) and not left_by_trainer(file)]
    # An index of pickled weights may name any file.
    pickles += [file for file in files if file.match("*.bin.index.json")]
    if read := sorted(str(file) for file in pickles if file.parent not in safe):
        raise ValueError(
            f"{root} holds {read}, which may run code when read, and which no model needs. Weights belong into "
            "safetensors files."
        )


def _measure_tensors(files: list[Path]) -> tuple[int, int]:
    """The number of tensors in safetensors files, whose headers must be sound, but not of adapters; and the largest
    dimension of any."""
    tensors, largest = 0, 0
    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as content:
                    names = list(content.keys())
                    largest = max([largest, *(n for name in names for n in content.get_slice(name).get_shape())])
                    tensors += 0 if file.name.startswith("adapter_model") else len(names)
            except (SafetensorError, OSError) as error:
                with file.open("rb") as content:
                    pointer = content.read(32).startswith(b"version https://git-lfs")
                fix = " It is a pointer of git LFS: run git lfs pull." if pointer else ""
                raise ValueError(f"{file} is damaged or cut off: {error}.{fix}") from error
    return tensors, largest


def _demand_sizes(file: Path, content: dict[str, Any], tensors: int, largest: int) -> None:
    """Check that a configuration asks for no model that its weights are not, and for no endless work.

    Args:
        file: the configuration.
        content: of it.
        tensors: how many there are beside it, but for adapters'.
        largest: dimension of any tensor.
    """
    most = max(4 * largest, LARGEST_SIZE)  # tiny models keep the sizes of the large ones that they stand for
    for holder in _objects(content):
        for key, value in holder.items():
            numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]
            number = max(numbers, default=0)
            if DEPTH.search(key):
                number = max(number, len(value) if isinstance(value, list) else 0)
                if number > MOST_LAYERS or (tensors and number > max(tensors, FEW_LAYERS)):
                    raise ValueError(f"{file} says {number:,} in {key!r}, and the weights are {tensors:,} tensors.")
            elif SIZE.search(key) and not NO_SIZE.search(key) and number > most:
                raise ValueError(f"{file} says {number:,} in {key!r}, and the largest of its weights has {largest:,}.")
            elif key == "prompts" and isinstance(value, dict) and len(value) > MOST_PROMPTS:
                raise ValueError(f"{file} has {len(value):,} prompts, which no model has.")
            elif key == "processing_kwargs":
                asked = [n for part in _objects(value) for n in part.values() if isinstance(n, int)]
                if max(asked, default=0) > MOST_TOKENS:
                    raise ValueError(f"{file} says {max(asked):,} in 'processing_kwargs', to pad texts to.")
    if file.name == "adapter_config.json":
        given = [content.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")]
        given += [name for key in ("rank_pattern", "alpha_pattern") for name in content.get(key) or ()]
        for pattern in given:
            # A group that repeats, or many that do, can take Python's re longer than anybody lives.
            if isinstance(pattern, str) and (
                len(pattern) > LONGEST_PATTERN
                or re.search(r"\)[*+{?]", pattern)
                or len(re.findall(r"[*+{]", pattern)) > 4
            ):
                raise ValueError(f"{file} has the regular expression {pattern[:80]!r}, which may never end.")


def _demand_modules(file: Path, content: Any) -> None:
    entries = content if isinstance(content, list) else []
    shape = {"type": str, "path": str, "name": str}
    if not entries or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in shape.items())
        for entry in entries
    ):
        raise ValueError(f"{file} is no list of modules, each with its {', '.join(shape)}.")
    for entry in entries:
        _demand_inside(file, entry["path"])
        if not all(part.isidentifier() for part in entry["type"].split(".")):
            raise ValueError(f"{file} names {entry['type']!r}, which is not a class.")


def _demand_index(file: Path, content: Any) -> None:
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{file} is no index of weights: it has no weight_map of file names.")
    for name in set(names.values()):
        _demand_inside(file, name)
        if not name.endswith((".safetensors", ".bin")):
            raise ValueError(f"{file} names {name!r}. Weights belong into safetensors files.")


def _demand_inside(file: Path, path: str) -> None:
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    if posix.is_absolute() or windows.is_absolute() or ".." in (*posix.parts, *windows.parts):
        raise ValueError(f"{file} names {path!r}, which is outside of the folder.")


def _unknown_class(root: Path, name: str) -> str | None:
    """Why a class of modules.json is not known, if it is not."""
    if name.startswith(STOCK):
        return None if _is_stock(name, STOCK_MODULES) else f"{name!r} is no module of sentence-transformers"
    if name not in MODULES:
        return f"{name!r} is not one of this package's classes"
    file = root / f"{name.partition('.')[0]}.py"
    if name.count(".") == 1 and not file.is_file():
        return f"{name!r} is in no file of the folder"
    return None


def _is_stock(name: str, known: set[str]) -> bool:
    """Does a dotted name lead to one of these classes of sentence-transformers?"""
    if not name.startswith(STOCK) or name.rpartition(".")[2] not in known:
        return False
    try:
        found = import_from_string(name)
    except (ImportError, AttributeError, ValueError, TypeError):
        return False
    return isinstance(found, type) and found.__module__.startswith(STOCK)


def _known_files(with_released: bool) -> set[str]:
    shipped = {_hash(file) for file in Path(reference.__file__).parent.glob("*.py")}
    # Released code ran that of an adapter's base.
    return shipped | set(RELEASED) if with_released else shipped


def _named_code(name: str, content: Any, own: bool) -> Iterator[str]:
    """The reasons why a configuration leads to code.

    Args:
        name: of its file.
        content: of it.
        own: whether the model has classes of its own, so that loading it needs trust_remote_code, by which the hosts
            also run what ``auto_map`` names. Else they pass over it where they know the model's type.
    """
    for holder in _objects(content):
        for key, value in holder.items():
            if key == "trust_remote_code" and value:
                yield "it asks for trust_remote_code"
            elif key in ("auto_map", "custom_pipelines") and value and own:
                yield f"{key} names code of the model's own"
            elif key in ("activation_function", "activation_fn", "activation_fct") and not _is_activation(value):
                yield f"{key}={value!r} is no activation of torch.nn"
            elif key.strip("_").startswith(("attn_implementation", "experts_implementation")):
                kinds = value.values() if isinstance(value, dict) else [value]
                if any(isinstance(kind, str) and "/" in kind for kind in kinds):
                    yield f"{key}={value!r} is a kernel of the Hub"
            elif key in HANDED_ON and isinstance(value, dict):
                if others := sorted(name for name, given in value.items() if not _is_harmless(name, given)):
                    yield f"{key} has {', '.join(map(repr, others))}, which may name what the loaders read or run"
    if not isinstance(content, dict):
        return
    if name == "router_config.json" or "types" in content:
        types = content.get("types")
        for kind in types.values() if isinstance(types, dict) else []:
            if not (isinstance(kind, str) and (kind in MODULES or _is_stock(kind, STOCK_MODULES))):
                yield f"types has {kind!r}, which is no module of sentence-transformers"
    for key in ("tokenizer_name_or_path", "audio_tokenizer"):
        if content.get(key):
            yield f"{key} leads to another place"
    if name == "wordembedding_config.json" and not _is_stock(str(content.get("tokenizer_class")), STOCK_TOKENIZERS):
        yield f"tokenizer_class={content.get('tokenizer_class')!r} is none of sentence-transformers"
    if name == "adapter_config.json":
        for key in ("megatron_config", "tokenizer_kwargs", "corda_config", "adapters"):
            if content.get(key):
                yield f"{key} leads to a module or a file of its choice"
        if content.get("peft_type", "LORA") not in ADAPTERS:
            yield f"peft_type={content['peft_type']!r} is none of {', '.join(sorted(ADAPTERS))}"


def _is_harmless(name: str, value: Any) -> bool:
    """May a configuration hand this to a loader?"""
    return name in HARMLESS and not isinstance(value, list | dict)


def _is_activation(value: Any) -> bool:
    """A plain name, of transformers' own, or a class of torch.nn."""
    if not isinstance(value, str) or "." not in value:
        return True
    module, _, name = value.rpartition(".")
    return (module == "torch.nn" or module.startswith("torch.nn.modules.")) and name.isidentifier()


def _objects(content: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects in ``content``, at every depth."""
    waiting = [content]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            yield here
            waiting += here.values()
        elif isinstance(here, list):
            waiting += here


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
