"""Adapters come back as they were: every tensor, in its revision and precision, on a base that can be found again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_llm, train_tokenizer
from hub_server import Repository, hub_server, online
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from test_convert_nv_embed import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, MixtralConfig

from examples.architectures.survey import decoder_types, tiny_config
from examples.demo.llm import bundled_llm
from st_llm_embed import build_model
from st_llm_embed.cli import main
from st_llm_embed.convert import load_nv_embed
from st_llm_embed.hub import publish, save_sealed, seal
from st_llm_embed.model import _lora_targets
from st_llm_embed.modules import LLMBackbone
from st_llm_embed.trust import code_in
from st_llm_embed.weights.merging import merge_adapter

TEXTS = ["the cat sat", "seven dogs were barking"]
ENCODES = """
import json, sys
from sentence_transformers import SentenceTransformer
results = {}
for revision in sys.argv[2:]:
    model = SentenceTransformer(sys.argv[1], trust_remote_code=True, revision=revision, device="cpu")
    results[revision] = model.encode(["the cat sat"])[0].tolist()
print(json.dumps(results))
"""
# What refuses before the work, and says why.
REFUSED = {
    "never calls its layers, so its attention cannot be proven": {"cpmant"},
    "does not obey attention='causal' with window='keep' in every layer": {"nemotron_h"},
    "is incompatible with Mamba-based models": {"falcon_h1", "falcon_mamba", "mamba", "mamba2"},
}
# Linear in class only, so that the host fails at the first text: LoRA by "all-linear" cannot be used.
NOT_LINEAR = {"deepseek_v4", "llama4_text", "phimoe"}
# Refused by merge_adapter, which writes nothing: layers that share a weight, or that the model reads without calling.
UNMERGED = {"jamba", "longcat_flash", "zamba"}


def build(folder: Path, model_type: str, recipe: str = "last-token", **settings) -> SentenceTransformer:
    """A random LLM of this architecture, bidirectional where it can be."""
    torch.manual_seed(0)
    AutoModel.from_config(tiny_config(model_type)).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    for attention in ("bidirectional", "causal"):
        try:
            return build_model(folder, recipe, attention=attention, max_seq_length=64, **settings)
        except ValueError:
            if attention == "causal":
                raise


def adapt(model: SentenceTransformer, **settings) -> SentenceTransformer:
    """LoRA that changes something, as training would; nothing of it is at its first value."""
    model.add_adapter(LoraConfig(r=2, **{"target_modules": ["q_proj", "v_proj"], **settings}))
    return train(model)


def train(model: SentenceTransformer) -> SentenceTransformer:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.startswith("0."):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def load(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True)


def assert_same(model: SentenceTransformer, vectors: np.ndarray, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(model.encode(TEXTS), vectors, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "dora"),
    [("llama", True), ("laguna", False), ("inkling2_text", False), ("gemma3n_text", False), ("mixtral", False)],
)
def test_every_tensor_comes_back_merged_and_sealed(tmp_path, model_type, dora):
    """Magnitudes, shared experts, convolutions, projections named as embeddings are, and experts' own weights."""
    if model_type not in decoder_types():
        pytest.skip(f"this transformers has no {model_type}")
    model = adapt(build(tmp_path / "llm", model_type), target_modules="all-linear", use_dora=dora)
    vectors = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert_same(load(tmp_path / "adapter"), vectors)
    assert_same(merge_adapter(model), vectors)
    seal(tmp_path / "adapter")
    assert_same(load(tmp_path / "adapter"), vectors)


@pytest.mark.parametrize(
    "settings",
    [
        {"trainable_token_indices": [10, 11]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["norm"], "use_dora": True},
        {"lora_bias": True},
    ],
    ids=["tokens", "embeddings", "norm", "bias"],
)
def test_what_else_an_adapter_trains_comes_back_and_is_saved_again(llm, tmp_path, settings):
    model = adapt(build_model(llm, "last-token"), **settings)
    model.save_pretrained(str(tmp_path / "adapter"))
    again = load(tmp_path / "adapter")
    again.save_pretrained(str(tmp_path / "again"))
    for found in (again, load(tmp_path / "again")):
        assert_same(found, model.encode(TEXTS))
    if "lora_bias" in settings:  # which the LLM's linear maps have no place for
        with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
            merge_adapter(again)
    else:
        assert_same(merge_adapter(again), model.encode(TEXTS))
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_an_adapter_that_peft_made_of_an_llm_with_a_head(llm, tmp_path):
    """Its tensors have other names, and the head's are of no use; one of a deeper LLM than is kept, either."""
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], use_dora=True, init_lora_weights=False)
    whole = get_peft_model(AutoModelForCausalLM.from_pretrained(llm), config).eval()
    for name, parameter in whole.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.5)
    whole.save_pretrained(tmp_path)
    train_tokenizer().save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5, 9]])
    with torch.no_grad():
        states = whole(ids, output_hidden_states=True).hidden_states
        loaded = LLMBackbone(str(tmp_path), attention="causal").eval().model
        torch.testing.assert_close(loaded(ids).last_hidden_state, states[-1])
        cut = LLMBackbone(str(tmp_path), attention="causal", num_layers=1).eval().model
        torch.testing.assert_close(cut(ids).last_hidden_state, cut.norm(states[1]))


def test_experts_that_were_adapted_one_by_one(tmp_path):
    """As transformers 4 did: the loaded LLM has them in one weight. The oracle adds each product to its expert."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = MixtralConfig(vocab_size=len(train_tokenizer()), num_local_experts=3, initializer_range=0.2, **sizes)
    base = save_llm(tmp_path / "llm", config)
    maps = {"w1": (32, 16), "w3": (32, 16), "w2": (16, 32)}
    names = {f"experts.{expert}.{name}": shape for expert in range(3) for name, shape in maps.items()}
    tensors, products = {}, {}
    for name, (width, out) in {"gate": (32, 3), **names}.items():
        down, up = 0.2 * torch.randn(2, width), 0.2 * torch.randn(out, 2)
        whole = f"base_model.model.model.layers.0.block_sparse_moe.{name}"
        tensors |= {f"{whole}.lora_A.weight": down, f"{whole}.lora_B.weight": up}
        products[name] = up @ down
    settings = {"target_modules": [*maps, "gate"], "base_model_name_or_path": base}
    LoraConfig(r=2, lora_alpha=2, **settings).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    train_tokenizer().save_pretrained(tmp_path)
    plain = AutoModel.from_pretrained(base).eval()
    experts = plain.layers[0].mlp
    ids = torch.tensor([[3, 4, 5, 9]])
    with torch.no_grad():
        experts.gate.weight += products["gate"]
        for expert in range(3):
            first, third, second = (products[f"experts.{expert}.{name}"] for name in maps)
            experts.experts.gate_up_proj[expert] += torch.cat([first, third])
            experts.experts.down_proj[expert] += second
        loaded = LLMBackbone(str(tmp_path), attention="causal").eval().model
        torch.testing.assert_close(loaded(ids).last_hidden_state, plain(ids).last_hidden_state, atol=1e-5, rtol=0)


def test_a_tensor_without_a_place_is_named(llm, tmp_path):
    adapt(build_model(llm, "last-token")).save_pretrained(str(tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}, file)
    with pytest.raises(ValueError, match=r"no place for 1 of its \d+ tensors \['layers\.7\.self_attn.*lacks 0"):
        load(tmp_path / "adapter")
    fewer = {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.q_proj.lora_B" not in name}
    save_file(fewer, file)
    with pytest.raises(ValueError, match=r"no place for 0 of .*lacks 1 \['layers\.1\.self_attn\.q_proj\.lora_B"):
        load(tmp_path / "adapter")
    other = save_llm(tmp_path / "other", hidden_size=64)
    save_file(tensors, file)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": other}))
    with pytest.raises(ValueError, match="The adapter does not fit '.*other'"):
        load(tmp_path / "adapter")


@pytest.mark.parametrize(
    "base",
    [pytest.param("org/base", id="base on the Hub"), pytest.param("", id="base beside it", marks=pytest.mark.slow)],
)
def test_a_revision_has_its_own_adapter(llm, tmp_path, base):
    """And an adapter's base is of the revision that its file names."""
    expected = {}
    with hub_server() as hub:
        for name in ("org/base", "org/adapter"):
            hub.repositories[name] = Repository(False)
        first_base = hub.repositories["org/base"].commit("main", contents(Path(llm)))
        hub.repositories["org/base"].commit("main", contents(Path(save_llm(tmp_path / "later"))))
        for version in ("first", "second"):
            folder = tmp_path / version
            model = adapt(build_model(llm, "last-token"))
            config = model[0].model.peft_config["default"]
            config.base_model_name_or_path, config.revision = base, first_base if base else None
            model.save_pretrained(str(folder))
            seal(folder)
            commit = hub.repositories["org/adapter"].commit("main", contents(folder))
            expected[commit] = model.encode(["the cat sat"])[0]
        commits = [*expected, "main"]
        done = subprocess.run(
            [sys.executable, "-c", ENCODES, "org/adapter", *commits],
            capture_output=True,
            text=True,
            env=online(hub, tmp_path / "home"),
        )
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads(done.stdout.splitlines()[-1])
    first, second = expected
    assert np.abs(expected[first] - expected[second]).max() > 1e-3
    for revision, commit in {first: first, second: second, "main": second}.items():
        np.testing.assert_allclose(got[revision], expected[commit], atol=1e-5)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("chosen", ["float32", "bfloat16"])
def test_the_precision_is_kept(llm, tmp_path, chosen):
    base = tmp_path / "llm"
    AutoModelForCausalLM.from_pretrained(llm, dtype=torch.bfloat16).save_pretrained(base)
    train_tokenizer().save_pretrained(base)
    model = adapt(build_model(base, "last-token", model_kwargs={"dtype": chosen}))
    save_sealed(model, tmp_path / "adapter")
    again = load(tmp_path / "adapter")
    precisions = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == precisions
    assert again[0].model.dtype == getattr(torch, chosen)
    assert_same(again, model.encode(TEXTS))


@pytest.mark.slow
def test_a_base_that_is_lost_is_saved_too(tmp_path):
    """A GGUF file's name and a temporary folder find nothing; a second save and an adapter on what was loaded do."""
    gguf = train(build_model(bundled_llm(), "nv-embed", lora=True, num_layers=1, max_seq_length=32, num_latents=4))
    converted = adapt(load_nv_embed(checkpoint(tmp_path / "source")))
    for name, model in (("gguf", gguf), ("converted", converted)):
        folder, vectors = tmp_path / name, model.encode(TEXTS)
        model.save_pretrained(str(folder))
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "./base"
        again = load(folder)
        assert_same(again, vectors)
        again.save_pretrained(str(tmp_path / f"{name}-again"))
        folder.rename(tmp_path / f"{name}-moved")
        assert_same(load(tmp_path / f"{name}-again"), vectors)
        assert_same(load(tmp_path / f"{name}-moved"), vectors)


def test_a_base_by_its_relative_path_is_found_from_anywhere(llm, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(llm).parent)
    model = adapt(build_model(Path(llm).name, "last-token"))
    model.save_pretrained(str(tmp_path / "adapter"))
    monkeypatch.chdir(tmp_path)
    assert_same(load(tmp_path / "adapter"), model.encode(TEXTS))
    with pytest.raises(ValueError, match="The adapter's base is .*, a folder of this machine"):
        publish(model, "org/name", adapter="only")  # before it is saved and checked
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    gone = {**config, "base_model_name_or_path": str(tmp_path / "gone")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(gone))
    with pytest.raises(FileNotFoundError, match="The base of the adapter .*gone', is not there. Put it back"):
        load(tmp_path / "adapter")


@pytest.mark.parametrize("model_type", ["mixtral", "phimoe", "llama4_text", "deepseek_v4", "jamba", "mamba", "falcon"])
def test_a_recipes_lora_leaves_experts_routers_and_kernels_alone(tmp_path, model_type):
    model = train(build(tmp_path / "llm", model_type, "nv-embed", lora=True, num_latents=4))
    loss = model(model.preprocess(TEXTS))["sentence_embedding"].square().sum()
    loss = loss + model.train()(model.preprocess(TEXTS))["token_embeddings"].square().sum()
    loss.backward()
    adapted = {name: p for name, p in model[0].model.named_parameters() if "lora_B" in name}
    assert adapted and not [name for name in adapted if "experts" in name or "router" in name]
    model.eval()
    vectors = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert_same(load(tmp_path / "adapter"), vectors)
    assert_same(merge_adapter(model), vectors)


@pytest.mark.parametrize("case", ["first layers", "added tokens", "no EOS", "trained norm"])
def test_an_adapter_alone_is_sealed(llm, tmp_path, case):
    settings = {"first layers": {"num_layers": 1}, "no EOS": {"add_eos": False}}.get(case, {})
    model = build_model(llm, "last-token", **settings)
    if case == "added tokens":
        model.tokenizer.add_tokens(["<new1>", "<new2>"])
        model[0].model.resize_token_embeddings(len(model.tokenizer))
    adapt(model, **({"modules_to_save": ["norm"]} if case == "trained norm" else {}))
    vectors = model.encode([*TEXTS, "dogs <new1>"])
    folder = save_sealed(model, tmp_path / "adapter")
    assert not (folder / "model.safetensors").exists()
    np.testing.assert_allclose(load(folder).encode([*TEXTS, "dogs <new1>"]), vectors, atol=1e-5)


def test_ones_own_adapter_is_known_code(llm, tmp_path):
    """merge, publish and evaluate ask for trust only where there is a reason; code that its base names never ran."""
    base = tmp_path / "llm"
    AutoModelForCausalLM.from_pretrained(llm).save_pretrained(base)
    train_tokenizer().save_pretrained(base)
    adapt(build_model(base, "last-token")).save_pretrained(str(tmp_path / "adapter"))
    assert code_in(tmp_path / "adapter") == {}
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "other.Model"}}))
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "second")]) == 0


def test_layers_that_share_a_weight_are_not_merged(tmp_path):
    model = adapt(build(tmp_path / "llm", "zamba"), target_modules="all-linear")
    with pytest.raises(ValueError, match="'layers.1.* and 'layers.3.*' share one weight"):
        merge_adapter(model)


def test_an_older_peft_than_transformers_takes_is_named_at_once(llm, tmp_path, monkeypatch):
    adapt(build_model(llm, "last-token")).save_pretrained(str(tmp_path / "adapter"))
    monkeypatch.setattr("st_llm_embed.modules.adapters.MIN_PEFT_VERSION", "99.0")
    for attempt in (lambda: build_model(llm, "nv-embed", lora=True), lambda: load(tmp_path / "adapter")):
        with pytest.raises(ImportError, match=r"transformers .* peft 99.0 or later, and peft .* is installed"):
            attempt()
    build_model(llm, "nv-embed")  # which needs none


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
@pytest.mark.parametrize("model_type", decoder_types())
def test_the_sweep(tmp_path, model_type, kind):
    """Every architecture: saved, loaded, sealed and merged it gives the same vectors, or says why not beforehand."""
    reason = next((reason for reason, types in REFUSED.items() if model_type in types), None)
    try:
        model = build(tmp_path / "llm", model_type)
        targets = "all-linear"
        if model_type in NOT_LINEAR or (kind == "DoRA" and _has_experts(model)):  # peft: no DoRA on experts' weights
            targets = _lora_targets(model[0].model)
        adapt(model, target_modules=targets, use_dora=kind == "DoRA")
    except ValueError as error:
        assert reason is not None and reason in str(error)
        return
    assert reason is None
    vectors = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert_same(load(tmp_path / "adapter"), vectors)
    seal(tmp_path / "adapter")
    assert_same(load(tmp_path / "adapter"), vectors)
    try:
        merged = merge_adapter(model)
    except (ValueError, RuntimeError) as error:
        assert model_type in UNMERGED and "Keep the adapter by itself" in str(error)
        return
    merged.save_pretrained(str(tmp_path / "merged"))
    assert_same(load(tmp_path / "merged"), vectors, atol=1e-4)


def _has_experts(model: SentenceTransformer) -> bool:
    return any(name.endswith("experts") for name, _ in model[0].model.named_modules())
