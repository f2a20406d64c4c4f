"""Make a saved model folder independent of the packages that its modules come from.

sentence-transformers saves a module of an installed package by its dotted name, which loads only where that package is
installed. ``seal`` turns such references into files of the repository, or, where stock modules do the same, into stock
modules, which need no ``trust_remote_code``.

What it adds to a stock model (the requirements, the keys for other engines) lasts until plain sentence-transformers
saves that model again: only modules with code of their own can write it back.

It works on folders, and never on a trainer's ``checkpoint-*``: the trainer finds its best checkpoint by matching the
dotted names with the live classes, and passes the last weights as the best where it cannot.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers.dynamic_module_utils import get_relative_import_files

from st_llm_embed.files import read_json, write_json
from st_llm_embed.hub.engine_keys import MODELS, write_engine_keys
from st_llm_embed.modules.adapters import ADAPTER_CONFIG
from st_llm_embed.modules.llm_backbone import REQUIREMENTS
from st_llm_embed.modules.root_config import inner_config, unwrap_config, wrap_config
from st_llm_embed.modules.sliding_windows import WIDE, WINDOWS
from st_llm_embed.trust import STOCK, check_model

BACKBONE = "LLMBackbone"
STOCK_BACKBONE = f"{MODELS}.Transformer"
# Their effect is in config.json and tokenizer.json, or there is none without the backbone's code.
BACKBONE_KEYS = ("attention", "window", "add_eos", "instruction_mask", "probe", "num_layers")


def seal(folder: str | Path) -> None:
    """Turn a saved model folder into one that loads without this package. Sealing twice changes nothing.

    Raises:
        FileNotFoundError: if it is not a folder that sentence-transformers saved.
        ValueError: if it is a trainer's checkpoint, names or links to something outside of it, holds pickles, or has a
            module whose class cannot be found to copy its source.
    """
    root = Path(folder)
    if (root / "trainer_state.json").is_file():
        raise ValueError(
            f"{root} is a trainer's checkpoint. Sealed, it could not be resumed from, nor reloaded as the best one at "
            "the end: the trainer finds it by its classes' names. Load it, and write it by save_sealed(model, folder)."
        )
    check_model(root)
    modules = read_json(root / "modules.json")
    if _is_stock_in_effect(root, modules):
        modules[0]["type"] = STOCK_BACKBONE
        settings = read_json(root / "sentence_bert_config.json")
        write_json(root / "sentence_bert_config.json", {k: v for k, v in settings.items() if k not in BACKBONE_KEYS})
        unwrap_config(root)
    elif modules[0]["type"].rpartition(".")[2] == BACKBONE:
        wrap_config(root)  # what convert writes was not saved by an LLMBackbone
    for entry in modules:
        if not entry["type"].startswith(STOCK):
            entry["type"] = _ship_source(root, entry["type"])
    is_transformer = modules[0]["type"].startswith(STOCK) and modules[0]["type"].endswith(".Transformer")
    if is_transformer and (root / "config.json").is_file():
        write_engine_keys(root, modules)
    write_json(root / "modules.json", modules)
    config = read_json(root / "config_sentence_transformers.json")
    write_json(root / "config_sentence_transformers.json", {**config, "requirements": REQUIREMENTS})


def _is_stock_in_effect(root: Path, modules: list[dict]) -> bool:
    """Would sentence-transformers' own Transformer do what the saved LLMBackbone does?

    The mode is in config.json and EOS in tokenizer.json. What stock lacks is the part of a prompt after the text, the
    exact instruction mask, which only a pooling that leaves the prompt out reads, a token for an empty text where the
    tokenizer gives none, and truncation on the left that spares the prompt. Symmetric windows are kept from other
    engines, which take them to be of another width. An adapter alone is never stock: the config.json of its base knows
    nothing of the mode or of a cut, and stock loads neither the revision it is asked for nor all tensors nor added
    tokens.
    """
    backbone, *others = modules
    if backbone["type"].rpartition(".")[2] != BACKBONE or (root / ADAPTER_CONFIG).is_file():
        return False
    prompts = read_json(root / "config_sentence_transformers.json")["prompts"]
    settings = read_json(root / "sentence_bert_config.json")
    config = inner_config(read_json(root / "config.json"))
    return (
        (settings["attention"] == "causal" or (config.get("is_causal") is False and not _keeps_windows(config)))
        and all(entry["type"].startswith(STOCK) for entry in others)
        and settings["add_eos"] != "nv-embed"
        and read_json(root / "tokenizer_config.json").get("truncation_side") != "left"
        and Tokenizer.from_file(str(root / "tokenizer.json")).num_special_tokens_to_add(False) > 0
        and not any("{text}" in prompt for prompt in prompts.values())
        and all(read_json(config).get("include_prompt", True) for config in root.glob("[0-9]*_*/config.json"))
    )


def _keeps_windows(config: dict[str, Any]) -> bool:
    return any(config.get(name) not in (None, WIDE) for name in WINDOWS)


def _ship_source(root: Path, reference: str) -> str:
    """Copy the source of ``package.module.Class``, and the siblings it imports, to the root; give ``module.Class``."""
    module, _, name = reference.rpartition(".")
    if (root / f"{module}.py").is_file():  # sealed already
        return reference
    file = f"{module.rpartition('.')[2]}.py"
    try:
        spec = None if module == "__main__" else importlib.util.find_spec(module)
        if spec is None and module != "__main__":
            raise ImportError(f"no module {module!r} is installed here")
        if spec is None or Path(spec.origin or "").name != file:
            raise ImportError("it is not in a file of its module's name")
        for source in map(Path, (spec.origin, *get_relative_import_files(spec.origin))):
            copied = root / source.name
            if copied.is_file() and copied.read_bytes() != source.read_bytes():
                raise ImportError(f"the folder has another {source.name} already")
            shutil.copy(source, copied)
    except (ImportError, ValueError, OSError) as error:  # of a script, a notebook, a function, a package's __init__
        raise ValueError(
            f"The source of the module class {reference!r} cannot be shipped ({error}), so nobody else could load the "
            "model. Put the class into a file, outside of any function, that imports of its own package only files "
            "beside it (from .other import name); import it from there, and save a model that is made of it."
        ) from error
    return f"{Path(file).stem}.{name}"
