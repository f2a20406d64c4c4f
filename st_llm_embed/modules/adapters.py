"""An adapter saved by itself: its base found, every tensor of its file taken, its base saved with it where need be.

peft writes an adapter and the name of its base; the hosts read them back, and lose some on the way: the revision, the
tensors that they do not expect, the base that has no name.
"""

from __future__ import annotations

import json
import logging
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from sentence_transformers.base.modules import Transformer
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import cached_file, check_peft_version, is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from .first_layers import keep_first_layers
from .root_config import load_inner_config

logger = logging.getLogger(__name__)
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
OWN_BASE = "./base"  # the base that is saved beside its adapter, in this subfolder
HUB_ARGUMENTS = {"cache_dir", "token", "revision", "subfolder", "local_files_only"}


def check_peft() -> None:
    """Check, before the work, that adapters work here.

    Raises:
        ImportError: if peft is missing, or older than the installed transformers takes.
    """
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        installed = f"peft {version('peft')}" if is_peft_available() else "no peft"
        minor = ".".join(transformers.__version__.split(".")[:2])
        raise ImportError(
            f"transformers {transformers.__version__} takes adapters of peft {MIN_PEFT_VERSION} or later, and "
            f"{installed} is installed. Fix: pip install 'peft>={MIN_PEFT_VERSION}'; where there is no such peft yet, "
            f"an older transformers: pip install 'transformers<{minor}'."
        ) from error


def split_hub_arguments(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that say where on the Hub a file is, and the others."""
    where = {key: arguments[key] for key in HUB_ARGUMENTS & set(arguments)}
    return where, {key: value for key, value in arguments.items() if key not in where}


def find_base(adapter: str, where: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """An adapter's base, and where on the Hub it is: the adapter's revision and subfolder are not its."""
    config = json.loads(Path(find_adapter_config_file(adapter, **where)).read_text(encoding="utf-8"))
    base = config["base_model_name_or_path"]
    if not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise FileNotFoundError(
            f"The base of the adapter {adapter!r}, {base!r}, is not there. Put it back, or write where it is now into "
            f"{ADAPTER_CONFIG} (base_model_name_or_path)."
        )
    if base == OWN_BASE:
        subfolder = Path(where.get("subfolder") or "", base)
        if Path(adapter).is_dir():  # whose subfolders transformers 5.20 passes over
            return str(Path(adapter, subfolder)), {**where, "subfolder": ""}
        return adapter, {**where, "subfolder": subfolder.as_posix()}
    return base, {**where, "revision": config.get("revision"), "subfolder": ""}


def load_adapter(model: PreTrainedModel, adapter: str, where: dict[str, Any], num_layers: int | None) -> None:
    """Put an adapter on its base, which gets room first where the adapter brings more embeddings.

    Args:
        model: the LLM to put it on.
        adapter: the adapter's Hub id or local folder.
        where: the arguments that say where on the Hub the adapter is.
        num_layers: how many of the LLM's first layers are kept; None for all.

    Raises:
        ValueError: naming tensors that the LLM has no place for, or that the file lacks.
    """
    weights = cached_file(adapter, WEIGHTS, **where)
    _make_room(model, weights)
    try:
        report = model.load_adapter(adapter, adapter_kwargs=where)
    except RuntimeError as error:  # of tensors of another shape
        raise ValueError(f"The adapter does not fit {model.name_or_path!r}: {error}") from error
    _take_all_tensors(model, weights, report, num_layers)


def _make_room(model: PreTrainedModel, adapter_weights: str) -> None:
    """Give the LLM as many input embeddings as were saved beside the adapter, which brings their values."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    # Bare, or within what an adapter put around them.
    pattern = rf"(.*\.)?{re.escape(name)}(\.token_adapter)?(\.base_layer)?\.weight"
    with safe_open(adapter_weights, framework="pt") as tensors:
        saved = [tensors.get_slice(key).get_shape()[0] for key in tensors.keys() if re.fullmatch(pattern, key)]
    if saved and saved[0] != embeddings.num_embeddings:
        model.resize_token_embeddings(saved[0], mean_resizing=False)


def _take_all_tensors(model: PreTrainedModel, adapter_weights: str, report: Any, num_layers: int | None) -> None:
    """Give the LLM every tensor of an adapter's file, LoRA in the precision that it was saved in.

    NOTE: transformers 5.23 leaves out without a word DoRA's magnitudes, trained tokens, and what it takes for weights
    under an older name.
    """
    (config,) = model.peft_config.values()
    base, config.base_model_name_or_path = config.base_model_name_or_path, None  # else peft looks for it on the Hub
    parameters = model.state_dict(keep_vars=True)
    adapter = model.get_adapter_state_dict(state_dict=parameters)
    config.base_model_name_or_path = base
    places = {**parameters, **adapter}

    def is_kept(name: str) -> bool:
        number = re.search(r"\.(\d+)\.", name)
        return num_layers is None or number is None or int(number[1]) < num_layers

    with safe_open(adapter_weights, framework="pt") as tensors:
        names = {key: key.removeprefix(PREFIX) for key in tensors.keys()}
        if not places.keys() & names.values():
            # Of an LLM with a head, whose other weights are under a prefix. The head's are of no use here.
            prefix = f"{model.base_model_prefix}."
            names = {key: name.removeprefix(prefix) for key, name in names.items() if name.startswith(prefix)}
        left_out, taken = [], set()
        for key, name in names.items():
            tensor, place = tensors.get_tensor(key), places.get(name)
            if place is not None and place.shape == tensor.shape:
                place.data = tensor.to(place.device, tensor.dtype if ".lora_" in name else place.dtype)
                taken.add(id(place))
            elif is_kept(name):
                left_out.append(name)
    if left_out and not getattr(report, "unexpected_keys", left_out):
        return  # experts that were saved one by one have been taken together
    expected = adapter.keys() - parameters.keys()
    lacking = [name for name in sorted(expected) if id(places[name]) not in taken and is_kept(name)]
    if left_out or lacking:
        raise ValueError(
            f"The adapter does not fit {base!r}: the LLM has no place for {len(left_out)} of its {len(names)} tensors "
            f"{left_out[:5]}, and it lacks {len(lacking)} {lacking[:5]}. Load it on the LLM that it was made for, or "
            "with the versions of transformers and peft that it was made with, and merge it there."
        )


def save_lost_base(model: PreTrainedModel, folder: Path) -> None:
    """Write the LLM beside its adapter where the adapter could not find it again: read from a GGUF file, or from a
    folder that is gone."""
    file = folder / ADAPTER_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    base = config["base_model_name_or_path"]
    if base and base != OWN_BASE and (Path(base).is_dir() or not Path(base).is_absolute()):
        return
    where = f"cannot be found at {base!r}" if base else "is saved nowhere else"
    logger.warning(f"The adapter's base {where}, so it is saved too, in {folder / OWN_BASE}.")
    with torch.device("meta"):  # the weights are assigned below
        plain = type(model)(model.config)
    wrappers = r"\.(base_layer|original_module|token_adapter)(?=\.)"
    weights = {re.sub(wrappers, "", name): tensor for name, tensor in model.state_dict().items()}
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()}, assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder / OWN_BASE)
    file.write_text(json.dumps({**config, "base_model_name_or_path": OWN_BASE}, indent=2), encoding="utf-8")


class AdapterTransformer(Transformer):
    """sentence-transformers' ``Transformer``, whose adapters come back as they were saved."""

    num_layers: int | None = None  # how many of the LLM's first layers are kept; cut before it gets an adapter

    def _load_config(
        self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]
    ) -> tuple[PretrainedConfig, bool]:
        """The LLM's configuration; an adapter's is that of its base."""
        where, others = split_hub_arguments(config_kwargs)
        if backend != "torch" or find_adapter_config_file(model_name_or_path, **where) is None:
            config, is_adapter = super()._load_config(model_name_or_path, backend, config_kwargs)
            return load_inner_config(config, **others), is_adapter
        check_peft()
        base, base_where = find_base(model_name_or_path, where)
        # Consent to an adapter's code is none to its base's, which was not run where transformers knows the type.
        base_config, _ = PretrainedConfig.get_config_dict(base, **base_where)
        if base_config.get("model_type") in CONFIG_MAPPING:
            others["trust_remote_code"] = False
        return load_inner_config(AutoConfig.from_pretrained(base, **others, **base_where), **others), True

    def _load_model(
        self,
        model_name_or_path: str,
        transformer_task: str,
        config: PretrainedConfig,
        backend: str,
        is_peft_model: bool,
        **model_kwargs: Any,
    ) -> PreTrainedModel:
        """Load the LLM; an adapter after its base, which gets room first where the adapter brings more embeddings."""

        def load(*arguments: Any, **named: Any) -> PreTrainedModel:
            llm = super(AdapterTransformer, self)._load_model(*arguments, **named)
            if self.num_layers is not None:
                keep_first_layers(llm, self.num_layers)
            return llm

        if not is_peft_model:
            return load(model_name_or_path, transformer_task, config, backend, is_peft_model, **model_kwargs)
        where, others = split_hub_arguments(model_kwargs)
        base, base_where = find_base(model_name_or_path, where)
        # NOTE: of an adapter, sentence-transformers 6.2 drops the revision, and transformers then takes main's.
        # Told where to look for an adapter of the base's own, lest it finds this one above a base in a subfolder.
        others["adapter_kwargs"] = base_where
        if is_of_transformers(config):
            others["trust_remote_code"] = False
        model = load(base, transformer_task, config, backend, False, **others, **base_where)
        if base.startswith(model_name_or_path):  # beside it, where the next adapter cannot find it
            model.name_or_path = ""
        load_adapter(model, model_name_or_path, where, self.num_layers)
        return model

    def get_config_dict(self) -> dict[str, Any]:
        config = super().get_config_dict()
        if self._has_adapter() and not getattr(self.model, "is_quantized", False):
            # An adapter's base would come back in the precision of its own files.
            dtype = str(self.model.get_input_embeddings().weight.dtype).removeprefix("torch.")
            config["model_kwargs"] = {"dtype": dtype}
        return config

    def _has_adapter(self) -> bool:
        return getattr(self.model, "_hf_peft_config_loaded", False)

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write it; of an LLM with an adapter only that, and the LLM besides where the adapter could not name it."""
        super().save(output_path, *args, **kwargs)
        if self._has_adapter():
            save_lost_base(self.model, Path(output_path))


def is_of_transformers(thing: Any) -> bool:
    """Is it of a class of transformers, and not of code that came with a model?"""
    return type(thing).__module__.startswith("transformers.")
