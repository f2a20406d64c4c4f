"""LatentAttentionPooling against the paper's formula, the original's stored outputs, and itself in other layouts."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from st_llm_embed import LatentAttentionPooling
from st_llm_embed.convert.nv_embed import LATENT_NAMES


def our_name(name: str) -> str:
    for theirs, ours in LATENT_NAMES.items():
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


def literal(layer: LatentAttentionPooling, features: dict) -> torch.Tensor:
    """Every step as the paper writes it, nothing folded and nothing kept: token by token, then the mean."""
    out = []
    for row, mask in zip(features["token_embeddings"], features["attention_mask"], strict=True):
        tokens = row[mask.bool()]
        queries = layer.to_q(layer.token_norm(tokens)).unflatten(1, (layer.num_heads, -1))
        keys, values = layer.to_kv(layer.latent_norm(layer.latents)).chunk(2, dim=-1)
        keys, values = (states.unflatten(1, (layer.num_heads, -1)) for states in (keys, values))
        weights = (torch.einsum("thd,rhd->htr", queries, keys) / layer.head_dim**0.5).softmax(dim=-1)
        tokens = tokens + layer.to_out(torch.einsum("htr,rhd->thd", weights, values).flatten(1))
        if layer.mlp == "geglu":
            value, gate = layer.mlp_in(layer.mlp_norm(tokens)).chunk(2, dim=-1)
            tokens = tokens + layer.mlp_out(value * F.gelu(gate))
        elif layer.mlp == "gelu":
            tokens = tokens + layer.mlp_out(F.gelu(layer.mlp_in(layer.mlp_norm(tokens))))
        out.append(tokens.mean(dim=0))
    return torch.stack(out)


@pytest.mark.parametrize("mlp", ["geglu", "gelu", None])
@pytest.mark.parametrize("head_dim", [2, 24])  # plain is cheaper, folded is cheaper
def test_the_fast_forms_equal_the_literal_one_and_so_do_their_gradients(mlp, head_dim):
    layer = LatentAttentionPooling(12, num_latents=5, num_heads=3, head_dim=head_dim, mlp=mlp)
    assert layer._is_folding_cheaper(tokens=200) == (head_dim == 24)
    mask = torch.ones(4, 60, dtype=torch.long)
    mask[1, 7:] = 0
    gradients = []
    for form in (literal, lambda layer, features: layer(features)["sentence_embedding"]):
        torch.manual_seed(1)
        states = torch.randn(4, 60, 12, requires_grad=True)
        layer.zero_grad()
        pooled = form(layer, {"token_embeddings": states, "attention_mask": mask})
        (pooled * torch.linspace(-1, 1, 12)).sum().backward()
        gradients.append([pooled.detach(), states.grad, *(p.grad for p in layer.parameters())])
    assert gradients[0][1].abs().max() > 1e-3
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-6, rtol=1e-5)
    layer.eval()
    with torch.no_grad():
        kept = layer({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"]
    torch.testing.assert_close(kept, gradients[0][0], atol=1e-6, rtol=1e-6)


def train_a_step(layer):
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(batch(dtype=torch.float32))["sentence_embedding"].square().sum().backward()
    optimizer.step()
    layer.eval()


def step_in_evaluation_mode(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(batch(dtype=torch.float32))["sentence_embedding"].square().sum().backward()
    optimizer.step()


def merge_into_data(layer):
    layer.to_kv.weight.data += 0.1 * torch.randn_like(layer.to_kv.weight)


def replace_the_latents(layer):
    layer.latents = torch.nn.Parameter(torch.randn_like(layer.latents))


@pytest.mark.parametrize("head_dim", [2, 24])
@pytest.mark.parametrize(
    "change",
    [
        train_a_step,
        step_in_evaluation_mode,
        merge_into_data,
        replace_the_latents,
        lambda layer: layer.load_state_dict(LatentAttentionPooling(12, 5, 3, layer.head_dim).state_dict()),
        lambda layer: layer.double().float().to_q.weight.data.mul_(2),
    ],
)
def test_what_is_kept_is_dropped_when_weights_change(head_dim, change):
    layer = LatentAttentionPooling(12, num_latents=5, num_heads=3, head_dim=head_dim).eval()
    features = batch(dtype=torch.float32)
    with torch.no_grad():
        before = layer(dict(features))["sentence_embedding"]
        kept = layer._cache
        layer(dict(features))
        assert kept is not None and layer._cache is kept  # kept, while nothing changes
    change(layer)
    with torch.no_grad():
        after = layer(dict(features))["sentence_embedding"]
    torch.testing.assert_close(after, literal(layer, features).detach(), atol=1e-5, rtol=1e-5)
    assert (after - before).abs().max() > 1e-3


def test_an_adapter_on_the_layer_is_not_folded_away():
    layer = LatentAttentionPooling(12, num_latents=5, num_heads=3, head_dim=24)
    config = LoraConfig(target_modules=["to_q", "to_kv", "to_out"], r=2, init_lora_weights=False)
    adapted = get_peft_model(layer, config).eval()
    features = batch(dtype=torch.float32)
    with torch.no_grad():
        before = adapted(dict(features))["sentence_embedding"]
        torch.testing.assert_close(before, literal(layer, features), atol=1e-5, rtol=1e-5)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(dict(features))["sentence_embedding"], before, atol=1e-5, rtol=1e-5)


def test_many_tokens_are_pooled_in_chunks():
    layer = LatentAttentionPooling(12, num_latents=5, num_heads=3).eval()
    features = {"token_embeddings": torch.randn(3, 1500, 12), "attention_mask": torch.ones(3, 1500).long()}
    seen = []
    layer.token_norm.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with torch.no_grad():
        pooled = layer(dict(features))["sentence_embedding"]
    assert len(seen) == 9 and max(seen) == 512
    torch.testing.assert_close(pooled, literal(layer, features).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [2, 24])
def test_gradient_checkpointing_gives_the_same_gradients(head_dim):
    layer = LatentAttentionPooling(12, num_latents=5, num_heads=3, head_dim=head_dim)
    model = SentenceTransformer(modules=[layer])
    given = {"token_embeddings": torch.randn(3, 1500, 12), "attention_mask": torch.ones(3, 1500).long()}
    calls, gradients = [], []
    layer.mlp_in.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
            layer.gradient_checkpointing_enable(None, every_n_layers=2)  # as transformers 5.20 and later have it
        layer.zero_grad()
        states = given["token_embeddings"].clone().requires_grad_()
        calls.clear()
        layer.train()({**given, "token_embeddings": states})["sentence_embedding"].square().sum().backward()
        gradients.append([states.grad, *(p.grad.clone() for p in layer.parameters())])
    assert len(calls) == 18 and max(calls) == 512  # each of 9 chunks twice
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("head_dim", [2, 24])
def test_weights_made_in_inference_mode(head_dim):
    """They count no versions; what is kept of them is dropped all the same when they change."""
    features = batch(dtype=torch.float32)
    with torch.inference_mode():
        layer = LatentAttentionPooling(12, num_latents=5, num_heads=3, head_dim=head_dim).eval()
        for factor in (1.0, 2.0):
            layer.to_kv.weight *= factor
            torch.testing.assert_close(layer(dict(features))["sentence_embedding"], literal(layer, features))
    with torch.no_grad():
        torch.testing.assert_close(layer(dict(features))["sentence_embedding"], literal(layer, features))


def test_rows_without_a_token_and_batches_without_one_are_zero():
    layer = LatentAttentionPooling(12, num_latents=5, num_heads=3, mlp=None, normalize=True)
    features = batch(dtype=torch.float32)
    features["attention_mask"][1] = 0
    pooled = layer(dict(features))["sentence_embedding"]
    assert torch.equal(pooled[1], torch.zeros(12))
    torch.testing.assert_close(pooled[[0, 2]].norm(dim=1), torch.ones(2))
    with torch.no_grad():
        features["attention_mask"][:] = 0
        assert torch.equal(layer.eval()(dict(features))["sentence_embedding"], torch.zeros(3, 12))


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
    chosen = {"mlp_ratio": 2, "mlp": "gelu", "include_prompt": True, "normalize": True}
    layer = LatentAttentionPooling(12, num_latents=5, num_heads=3, head_dim=7, **chosen)
    layer.save(str(tmp_path))
    again = LatentAttentionPooling.load(str(tmp_path))
    assert again.get_config_dict() == layer.get_config_dict() and again.get_embedding_dimension() == 12
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))


def test_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="num_heads=5 does not divide embedding_dimension=12"):
        LatentAttentionPooling(12, num_heads=5)
    with pytest.raises(ValueError, match="mlp='swiglu' is unknown. Valid values: 'geglu', 'gelu', None"):
        LatentAttentionPooling(12, num_heads=3, mlp="swiglu")
    with pytest.raises(ValueError, match="token_embeddings are 12 wide, but .* embedding_dimension=16"):
        LatentAttentionPooling(16)(batch(dtype=torch.float32))
    with pytest.raises(ValueError, match="num_latents=0 must be at least 1"):
        LatentAttentionPooling(12, num_latents=0)
