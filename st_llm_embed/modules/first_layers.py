"""Cut an LLM to its first layers, so that it loads as what was saved; or say why that cannot be.

What the config says of each layer is shortened with the layers. Some architectures draw more from their depth:
MiniCPM3 scales each residual by it, Gemma 4 has its last layer attend in full, GPT-NeoX-Japanese gives its last layer
a bias of its own. So nothing is assumed. The model that loading will make of the shorter config is made, without
weights, and compared part by part with the whole one; and the states after the last kept layer are compared with
those before the cut, on a few tokens.
"""

from __future__ import annotations

import copy
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

PLAIN = (bool, int, float, str, type(None), list, tuple, set, dict)
TOLERANCE = 1e-3  # of the largest state: the same sums, but perhaps in another order


def keep_first_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Cut the LLM to its first ``num_layers`` layers; embeddings and the final norm stay.

    Args:
        model: the LLM as it was loaded, without an adapter. Of no further use where it was refused.
        num_layers: how many layers to keep.

    Raises:
        ValueError: if ``num_layers`` is outside 1..depth, or if the cut LLM would be another one after loading.
    """
    config = model.config.get_text_config()
    check_depth(config, num_layers)
    depth = config.num_hidden_layers
    if num_layers < depth:
        try:
            _cut(model, num_layers)
        except ValueError as error:
            raise ValueError(
                f"{config.model_type!r} cannot be cut to num_layers={num_layers} of its {depth} layers: {error}. "
                "Choose another num_layers, or another base."
            ) from error


def check_depth(config: PretrainedConfig, num_layers: int) -> None:
    """Check that an LLM has so many layers.

    Raises:
        ValueError: if ``num_layers`` is outside 1..depth.
    """
    config = config.get_text_config()
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise ValueError(
            f"num_layers={num_layers} is outside 1..{config.num_hidden_layers}, the depth of {config.model_type!r}."
        )


def _cut(model: PreTrainedModel, num_layers: int) -> None:
    changes = _of_first_layers(model.config.get_text_config(), num_layers)
    whole, cut = _without_weights(model, changes)
    stack = _find_layers(whole, cut, num_layers)
    values = _changed_values(whole, cut, stack, changes)
    shapes = _changed_shapes(whole, cut, stack, num_layers)
    if shapes and getattr(model, "is_quantized", False):
        raise ValueError(f"{next(iter(shapes))} is of all layers together, and quantized")
    layers = model.get_submodule(stack)
    expected = _states_after(model, layers[num_layers - 1])
    del layers[num_layers:]
    _set(model.config.get_text_config(), changes)
    for part, key, value in values:
        setattr(model.get_submodule(part), key, value)
    for name, shape in shapes.items():
        tensor = model.get_parameter(name)
        tensor.data = tensor.data[tuple(map(slice, shape))].clone()
    if (_states_after(model, layers[-1]) - expected).abs().max() > TOLERANCE * expected.abs().max():
        raise ValueError("without the layers after them, these give other states")


def _of_first_layers(config: PretrainedConfig, num_layers: int) -> dict[str, Any]:
    """What changes in the config: the depth, and whatever it says layer by layer."""
    depth, default = config.num_hidden_layers, type(config)()
    changes: dict[str, Any] = {"num_hidden_layers": num_layers}
    for key, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == depth:
            # Not those as long by chance, which have the same length at any depth, or are one number by default.
            usual = vars(default).get(key)
            if not usual or isinstance(usual, list | tuple) and len(usual) == default.num_hidden_layers:
                changes[key] = list(value[:num_layers])
    if per_layer := config.to_dict().get("per_layer_config"):
        changes["per_layer_config"] = {index: values for index, values in per_layer.items() if int(index) < num_layers}
    if hasattr(config, "attention_types"):  # gpt_neo: the kinds of its layers, as repetitions
        changes["attention_types"] = [[list(config.attention_layers[:num_layers]), 1]]
    if shared := getattr(config, "num_kv_shared_layers", None):  # gemma3n, gemma4: so many of the last layers
        changes["num_kv_shared_layers"] = max(0, num_layers - (depth - shared))
    return changes


def _set(config: PretrainedConfig, changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        setattr(config, key, value)


def _without_weights(model: PreTrainedModel, changes: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model, and what loading will make of its changed config once that is saved."""
    config = copy.deepcopy(model.config)
    try:
        _set(config.get_text_config(), changes)
        with TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            loaded = type(config).from_pretrained(folder)
        saved, again = config.get_text_config().to_dict(), loaded.get_text_config().to_dict()
        if different := [key for key in changes if saved.get(key) != again.get(key)]:
            raise ValueError(f"loading would change {different[0]} to {again.get(different[0])}")
        with torch.device("meta"):
            whole, cut = type(model)(copy.deepcopy(model.config)), type(model)(loaded)
        cut.init_weights()  # as loading does; rwkv's fails for one layer
    except Exception as error:  # whatever an architecture demands of its config
        raise ValueError(f"its config does not allow it ({error})") from error
    return whole, cut


def _find_layers(whole: nn.Module, cut: nn.Module, num_layers: int) -> str:
    """The name of the one list that is shorter."""
    before, after = _module_lists(whole), _module_lists(cut)
    shorter = [name for name in before if name in after and len(after[name]) < len(before[name])]
    if len(shorter) != 1 or len(after[shorter[0]]) != num_layers:
        raise ValueError("it has no single list of as many layers as its config counts")
    return shorter[0]


def _module_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}


def _changed_values(
    whole: nn.Module, cut: nn.Module, stack: str, changes: dict[str, Any]
) -> list[tuple[str, str, Any]]:
    """``(part, attribute, value)`` of what is another value with fewer layers: within a layer only the config's."""
    parts = dict(whole.named_modules(remove_duplicate=False))
    changed = []
    for name, part in cut.named_modules(remove_duplicate=False):
        if type(part) is not type(parts.get(name)):
            raise ValueError(f"loading would make {name} a {type(part).__name__}")
        before = vars(parts[name])
        for key, value in vars(part).items():
            if not key.startswith("_") and isinstance(value, PLAIN) and value != before.get(key):
                if name.startswith(f"{stack}.") and value != changes.get(key):
                    raise ValueError(f"loading would change {name}.{key} from {before.get(key)} to {value}")
                changed.append((name, key, value))
    return changed


def _changed_shapes(whole: nn.Module, cut: nn.Module, stack: str, num_layers: int) -> dict[str, torch.Size]:
    """The shapes of tensors that hold something of all layers together, those of the first layers first."""
    depth = len(_module_lists(whole)[stack])
    removed = tuple(f"{stack}.{index}." for index in range(num_layers, depth))
    before = {name: tensor.shape for name, tensor in whole.state_dict().items() if not name.startswith(removed)}
    after = {name: tensor.shape for name, tensor in cut.state_dict().items()}
    if different := sorted(before.keys() ^ after.keys()):
        raise ValueError(f"with and without the layers after them, it has different weights ({different[0]})")
    changed = {name: shape for name, shape in after.items() if shape != before[name]}
    for name, shape in changed.items():
        in_proportion = all(
            new in (old, old * num_layers / depth) for old, new in zip(before[name], shape, strict=True)
        )
        if name.startswith(f"{stack}.") or not in_proportion:
            raise ValueError(f"loading would change the shape of {name} from {tuple(before[name])} to {tuple(shape)}")
    return changed


@torch.no_grad()
def _states_after(model: PreTrainedModel, layer: nn.Module) -> Tensor:
    """A layer's output on a few tokens, in float32."""
    outputs = []
    handle = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.tensor([[(101 + 7919 * position) % vocabulary for position in range(5)]], device=model.device)
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        handle.remove()
    return (outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]).float()
