"""``num_layers``: the cut LLM is the whole one stopped early, and comes back as it was saved; or it is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import train_tokenizer
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from examples.architectures.survey import SIZES, decoder_types, tiny_config
from st_llm_embed import build_model
from st_llm_embed.hub import seal
from st_llm_embed.modules.first_layers import keep_first_layers

TEXTS = ["the cat sat", "seven dogs were barking at the moon", "a cat " * 20]
IDS = (torch.arange(40).reshape(2, 20) * 37 + 5) % 300  # longer than the windows of 4, within the small vocabulary


@torch.no_grad()
def states(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).last_hidden_state


def stopped_early(whole: PreTrainedModel, num_layers: int) -> Tensor:
    """The oracle: the whole model, whose further layers give back what they get."""
    whole = copy.deepcopy(whole)
    depth = whole.config.num_hidden_layers
    layers = next(part for part in whole.modules() if isinstance(part, nn.ModuleList) and len(part) == depth)
    given: list = []
    layers[0].register_forward_hook(lambda layer, inputs, output: given.append(output))
    for layer in layers[num_layers:]:
        layer.forward = lambda hidden_states, *args, **kwargs: (
            hidden_states if isinstance(given[0], Tensor) else (hidden_states, *given[0][1:])
        )
    return states(whole)


def save(config: PretrainedConfig, folder: Path) -> PreTrainedModel:
    """A random LLM as a folder, and what is loaded of it."""
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    return AutoModel.from_pretrained(folder).eval()


def deeper(name: str, **changes) -> PretrainedConfig:
    config = tiny_config(name)
    return type(config)(**{**config.to_dict(), **changes})


def check_every_cut(whole: PreTrainedModel, folder: Path) -> list[int]:
    """Each number of layers that is not refused gives the oracle's states, saved and loaded too. Gives the numbers."""
    right = []
    for num_layers in range(1, whole.config.num_hidden_layers):
        cut = AutoModel.from_pretrained(folder).eval()
        try:
            keep_first_layers(cut, num_layers)
        except ValueError as error:
            assert f"cannot be cut to num_layers={num_layers} of its" in str(error)
            continue
        torch.testing.assert_close(states(cut), stopped_early(whole, num_layers), atol=1e-5, rtol=0)
        cut.save_pretrained(folder / str(num_layers))
        again, report = AutoModel.from_pretrained(folder / str(num_layers), output_loading_info=True)
        assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
        torch.testing.assert_close(states(again.eval()), states(cut), atol=1e-5, rtol=0)
        right.append(num_layers)
    return right


@pytest.mark.parametrize(
    ("config", "right"),
    [
        (("llama", {"num_hidden_layers": 3}), [1, 2]),
        (("exaone_moe", {}), [1]),
        (("mellum", {}), [1]),
        (("deepseek_v32", {}), [1]),
        (("glm_moe_dsa", {}), [1]),
        (("cohere2_moe", {}), [1]),
        (("laguna", {}), [1]),
        (("gpt_neo", {}), [1]),
        (("mamba2", {}), [1]),  # its time_step_limit is as long as it is deep, by chance
        (("gemma3n_text", {}), [1]),  # one tensor holds embeddings for all layers
        (("gemma4_text", {}), []),  # its last layer attends in full
        (("gemma4_unified_text", {}), []),
        (("minicpm3", {"num_hidden_layers": 3}), []),  # scales residuals by the depth
        (("gpt_neox_japanese", {"num_hidden_layers": 3}), []),  # a bias in the last layer
        (("rwkv", {}), []),  # transformers divides by the depth less one when it loads it
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_cut_llm_comes_back_as_the_whole_one_stopped_early_or_is_refused(tmp_path, config, right):
    name, changes = config
    whole = save(deeper(name, **changes), tmp_path)
    assert check_every_cut(whole, tmp_path) == right


def test_the_refusal_names_what_loading_would_change(tmp_path):
    save(tiny_config("minicpm3"), tmp_path)
    train_tokenizer().save_pretrained(tmp_path)
    reason = r"'minicpm3' cannot be cut to num_layers=1 of its 2 layers: .*residual_scale from 0\.98.* to 1\.4"
    with pytest.raises(ValueError, match=reason):
        build_model(tmp_path, "mean", num_layers=1)


@pytest.mark.slow
def test_every_architecture_cut_saved_loaded_and_sealed(tmp_path, monkeypatch):
    """Vectors as saved; the states of the whole LLM stopped early; or refused when the model is built."""
    tokenizer = train_tokenizer()
    for size in ("vocab_size", "vocab_size_per_layer_input"):
        monkeypatch.setitem(SIZES, size, len(tokenizer))
    right, refused = [], []
    for name in decoder_types():
        folder = tmp_path / name
        whole = save(tiny_config(name), folder)
        if whole.config.num_hidden_layers == 1:
            continue
        kept = check_every_cut(whole, folder)
        (right if kept else refused).append(name)
        tokenizer.save_pretrained(folder)
        for num_layers in kept:
            # Not all can be bidirectional, or pad on the right; all can be causal.
            model = build_model(folder, "last-token", num_layers=num_layers, probe=False).eval()
            expected = model.encode(TEXTS, convert_to_tensor=True)
            saved = folder / f"model-{num_layers}"
            model.save_pretrained(str(saved))
            for sealed in (False, True):
                if sealed:
                    seal(saved)
                again = SentenceTransformer(str(saved), trust_remote_code=True).eval()
                torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), expected, atol=1e-5, rtol=0)
    assert len(right) > 10 * len(refused) > 0
