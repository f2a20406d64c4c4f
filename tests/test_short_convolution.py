"""LFM2 and its kind without a causal mask: convolutions by the formula, padding invisible, published and loaded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, save_llm
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from examples.architectures.survey import tiny_config
from st_llm_embed import LLMBackbone, MNTPLoss, PretextLoss, build_model
from st_llm_embed.hub import check, save_sealed
from st_llm_embed.modules.attention_mode import set_attention_mode
from st_llm_embed.modules.short_convolution import centre_convolutions

KINDS = [name for name in ("lfm2", "lfm2_moe", "lfm3") if name in CONFIG_MAPPING]  # lfm3 is new


def base(folder: Path, name: str, **changes: object) -> str:
    config = tiny_config(name)
    config.vocab_size = 710
    for key, value in changes.items():
        setattr(config, key, value)
    return save_llm(folder / name, config)


@pytest.mark.parametrize("name", KINDS)
def test_a_convolution_is_the_formula(name):
    model = AutoModel.from_config(tiny_config(name)).eval()
    part = centre_convolutions(model)[0]
    states, mask = torch.randn(2, 9, 32), torch.ones(2, 9)
    mask[0, :2] = mask[1, 5:] = 0
    found = part(states, attention_mask=mask)
    kernel = part.conv.weight[:, 0]  # (dim, K)
    for row in range(2):
        gate, output_gate, value = part.in_proj(states[row]).chunk(3, dim=-1)
        real = mask[row].nonzero().flatten().tolist()
        for t in real:
            mixed = torch.zeros(32)
            for k in range(kernel.shape[1]):
                if (other := t - kernel.shape[1] // 2 + k) in real:
                    mixed = mixed + kernel[:, k] * gate[other] * value[other]
            torch.testing.assert_close(found[row, t], part.out_proj(output_gate[t] * mixed), atol=1e-6, rtol=1e-5)
    assert kernel.shape[1] in (3, 7) and found.abs().max() > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_a_text_has_the_same_states_in_any_batch_and_every_token_hears_all(tmp_path, name):
    backbone = LLMBackbone(base(tmp_path, name)).eval()
    assert backbone.config.is_causal is True  # stock modules would leave the convolutions as they are
    for side in ("left", "right"):
        backbone.tokenizer.padding_side = side
        features = backbone.preprocess(TEXTS)
        with torch.no_grad():
            together = backbone(dict(features))["token_embeddings"]
            for row, text in enumerate(TEXTS):
                alone = backbone(backbone.preprocess([text]))["token_embeddings"][0]
                real = features["attention_mask"][row].bool()
                torch.testing.assert_close(together[row, real], alone, atol=1e-5, rtol=1e-5)
    one = backbone.preprocess([TEXTS[1]])
    for place in (0, -1):
        changed = {**one, "input_ids": one["input_ids"].clone()}
        changed["input_ids"][0, place] = 77
        with torch.no_grad():
            states = [backbone(dict(features))["token_embeddings"] for features in (one, changed)]
        assert ((states[0] - states[1]).abs().amax(dim=-1) > 1e-6).all()


def test_it_is_published_with_its_code_and_comes_back(tmp_path):
    model = build_model(base(tmp_path, "lfm2"), "mean").eval()
    expected = model.encode(TEXTS)
    folder = save_sealed(model, tmp_path / "sealed")
    assert (folder / "short_convolution.py").is_file()
    check(folder)
    again = SentenceTransformer(str(folder), trust_remote_code=True)
    assert again.encode(TEXTS) == pytest.approx(expected, abs=1e-6)
    model[0].probe = False
    model.save_pretrained(str(tmp_path / "unproven"))
    unproven = SentenceTransformer(str(tmp_path / "unproven"), trust_remote_code=True)
    assert unproven.encode(TEXTS) == pytest.approx(expected, abs=1e-6)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert twin.encode(TEXTS) == pytest.approx(expected, abs=1e-6)


def test_gradients_are_the_same_with_checkpointing(tmp_path):
    model = build_model(base(tmp_path, "lfm2"), "mean").train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model[0].model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(0)
        MNTPLoss(model)([model.preprocess(TEXTS)]).backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_it_is_causal_again_where_that_is_asked_for(tmp_path):
    folder = base(tmp_path, "lfm2")
    model, plain = (AutoModel.from_pretrained(folder).eval() for _ in range(2))
    ids = torch.arange(3, 17).unsqueeze(0)
    expected = plain(input_ids=ids, use_cache=False).last_hidden_state
    set_attention_mode(model, "bidirectional")
    set_attention_mode(model, "causal", window="keep")
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).last_hidden_state, expected)


def test_what_cannot_be_centred_is_refused(tmp_path):
    even = AutoModel.from_pretrained(base(tmp_path, "lfm2", conv_L_cache=4))
    with pytest.raises(ValueError, match="'lfm2' passes information between tokens .*by the recipe 'last-token'"):
        set_attention_mode(even, "bidirectional")
    flash = AutoModel.from_config(tiny_config("lfm2"))
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 takes no mask. Use model_kwargs={'attn_implementation'"):
        set_attention_mode(flash, "bidirectional")
    model = build_model(base(tmp_path / "whole", "lfm2"), "mean")
    with pytest.raises(ValueError, match="'lfm2' passes information .* cannot share a row"):
        PretextLoss(model)
