"""LatentAttentionPooling against the paper's formula, the original's stored outputs, and itself in other layouts."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from st_llm_embed import LatentAttentionPooling

ORIGINAL_NAMES = {
    "cross_attend_blocks.0.fn.": "",
    "cross_attend_blocks.0.norm_context": "latent_norm",
    "cross_attend_blocks.0.norm": "token_norm",
    "cross_attend_blocks.1.fn.net.0": "mlp_in",
    "cross_attend_blocks.1.fn.net.2": "mlp_out",
    "cross_attend_blocks.1.norm": "mlp_norm",
}


def our_name(name: str) -> str:
    for theirs, ours in ORIGINAL_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def formula(layer: LatentAttentionPooling, token: torch.Tensor) -> torch.Tensor:
    """One token, one head at a time."""
    d = layer.head_dim
    query = layer.to_q(layer.token_norm(token))
    keys, values = layer.to_kv(layer.latent_norm(layer.latents)).chunk(2, dim=-1)
    heads = []
    for h in range(layer.num_heads):
        part = slice(h * d, (h + 1) * d)
        weights = torch.softmax(keys[:, part] @ query[part] / d**0.5, dim=0)
        heads.append(weights @ values[:, part])
    token = token + layer.to_out(torch.cat(heads))
    value, gate = layer.mlp_in(layer.mlp_norm(token)).chunk(2)
    return token + layer.mlp_out(value * F.gelu(gate))


def batch(dim: int = 12, dtype=torch.float64):
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    return {"token_embeddings": torch.randn(3, 5, dim, dtype=dtype), "attention_mask": mask}


@pytest.mark.parametrize("head_dim", [None, 7])
def test_equals_the_formula(head_dim):
    layer = LatentAttentionPooling(12, num_latents=5, num_heads=3, head_dim=head_dim).double()
    features = batch()
    expected = torch.stack(
        [
            torch.stack([formula(layer, t) for t, real in zip(row, mask, strict=True) if real]).mean(dim=0)
            for row, mask in zip(features["token_embeddings"], features["attention_mask"], strict=True)
        ]
    )
    torch.testing.assert_close(layer(features)["sentence_embedding"], expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("case", ["s1", "s3"])
def test_equals_the_original(shared, case):
    folder = shared / "fixtures" / "latent_attention"
    spec = json.loads((folder / "meta.json").read_text())["cases"][case]
    stored = load_file(folder / f"{case}.safetensors")
    weights = {our_name(k.removeprefix("weights.")): v for k, v in stored.items() if k.startswith("weights.")}
    layer = LatentAttentionPooling(spec["hidden"], spec["latents"], spec["heads"], spec["dim_head"])
    layer.load_state_dict(weights)
    states = stored["hiddens"].clone().requires_grad_()
    tokens = layer.attend_to_latents(states.flatten(0, 1)).view_as(states)
    torch.testing.assert_close(tokens, stored["token_output"], atol=5e-5, rtol=0)
    features = {"token_embeddings": states, "attention_mask": stored["pool_mask"]}
    pooled = layer(features)["sentence_embedding"]
    torch.testing.assert_close(pooled, stored["pooled_raw"], atol=2e-5, rtol=0)
    normalized = F.normalize(pooled, dim=-1)
    torch.testing.assert_close(normalized, stored["pooled_normalized"], atol=2e-6, rtol=0)
    if spec["gradients"]:
        (normalized * stored["loss_projection"]).sum().backward()
        torch.testing.assert_close(states.grad, stored["grad.hiddens"], atol=2e-5, rtol=1e-5)
        gradients = {our_name(k.removeprefix("grad.weights.")): v for k, v in stored.items() if "grad.weights" in k}
        assert set(gradients) == set(dict(layer.named_parameters()))
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-5, rtol=1e-5)


def test_the_instruction_stays_out_and_the_mask_is_not_written():
    layer = LatentAttentionPooling(12, num_latents=5, num_heads=3).double()
    features = batch()
    instruction = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    kept = layer({**features, "attention_mask": features["attention_mask"] - instruction})["sentence_embedding"]
    mask = features["attention_mask"].clone()
    torch.testing.assert_close(layer({**features, "instruction_mask": instruction})["sentence_embedding"], kept)
    assert torch.equal(features["attention_mask"], mask)
    layer.include_prompt = True
    whole = layer(dict(features))["sentence_embedding"]
    torch.testing.assert_close(layer({**features, "instruction_mask": instruction})["sentence_embedding"], whole)
    assert not torch.allclose(whole, kept)


def test_a_text_that_is_all_instruction_is_pooled_over_it():
    layer = LatentAttentionPooling(12, num_latents=5, num_heads=3).double()
    features = batch()
    whole = layer(dict(features))["sentence_embedding"]
    everything = features["attention_mask"] * torch.tensor([[1], [0], [1]])
    pooled = layer({**features, "instruction_mask": everything})["sentence_embedding"]
    torch.testing.assert_close(pooled, whole)


def test_flattened_equals_padded():
    layer = LatentAttentionPooling(12, num_latents=5, num_heads=3).double()
    features = batch()
    instruction = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    real = features["attention_mask"].bool()
    flat = {
        "token_embeddings": features["token_embeddings"][real].unsqueeze(0),
        "instruction_mask": instruction[real].unsqueeze(0),
        "cu_seq_lens_q": F.pad(real.sum(dim=1).cumsum(0), (1, 0)).int(),
    }
    padded = layer({**features, "instruction_mask": instruction})["sentence_embedding"]
    torch.testing.assert_close(layer(flat)["sentence_embedding"], padded)


def test_every_weight_learns_and_half_precision_stays_close():
    layer = LatentAttentionPooling(16, num_latents=5, num_heads=4)
    features = batch(16, torch.float32)
    pooled = layer(dict(features))["sentence_embedding"]
    pooled.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
    features["token_embeddings"] = features["token_embeddings"].bfloat16()
    half = layer.bfloat16()(features)["sentence_embedding"]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), pooled.detach(), atol=5e-2, rtol=2e-2)


def test_saving_restores_everything(tmp_path):
    layer = LatentAttentionPooling(12, num_latents=5, num_heads=3, head_dim=7, mlp_ratio=2, include_prompt=True)
    layer.save(str(tmp_path))
    again = LatentAttentionPooling.load(str(tmp_path))
    assert again.get_config_dict() == layer.get_config_dict() and again.get_embedding_dimension() == 12
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))


def test_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="num_heads=5 does not divide embedding_dimension=12"):
        LatentAttentionPooling(12, num_heads=5)
    with pytest.raises(ValueError, match="num_latents=0 must be at least 1"):
        LatentAttentionPooling(12, num_latents=0)
