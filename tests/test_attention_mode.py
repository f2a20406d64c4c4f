"""Every architecture is bidirectional in fact, or refused; windows open, padding invisible, structured masks exact."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import save_llm, train_tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, BartConfig, BertConfig, T5Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from st_llm_embed import LLMBackbone, PretextLoss, build_model
from st_llm_embed.hub import save_sealed
from st_llm_embed.modules.attention_mode import attending, set_attention_mode
from st_llm_embed.tasks import EBAE_PROMPT, EBAR_PROMPT

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
HEADS = {**SHAPE, "head_dim": 8}
WINDOW = {"sliding_window": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32}
PATTERN = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
BY_CONFIG = {
    "llama": SHAPE,
    "mistral": {**SHAPE, **WINDOW},
    "qwen2": SHAPE,
    "qwen3": HEADS,
    "gemma": HEADS,
    "phi": SHAPE,
    "phi3": SHAPE,
    "olmo2": SHAPE,
    "granite": SHAPE,
    "gpt_neox": SHAPE,
    "starcoder2": SHAPE,
    "glm": HEADS,
    "smollm3": SHAPE,
    "gpt2": GPT2,
    "opt": {**SHAPE, **OPT},
}
BY_MASK = {
    "gemma2": {**HEADS, **PATTERN},
    "gemma3_text": {**HEADS, **PATTERN},
    "cohere2": {**SHAPE, **PATTERN},
    "olmo3": {**SHAPE, **PATTERN},
    "ministral": {**HEADS, **PATTERN},
    "stablelm": SHAPE,
    "nemotron": SHAPE,
}
SMALL_SSM = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
RECURRENT = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "falcon_h1": {**SHAPE, **SMALL_SSM},  # attention and a state-space model side by side in every layer
    "qwen3_next": {**HEADS, **LINEAR, **EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
}
TEXTS = ["the cat sat on the mat while seven dogs were barking at the moon", "dogs", "a quick brown fox jumped over"]


def llm(folder, name: str, **changes) -> str:
    tokenizer = train_tokenizer()
    common = {"vocab_size": len(tokenizer) + 8, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    settings = {**BY_CONFIG, **BY_MASK, **RECURRENT}[name]
    config = CONFIG_MAPPING[name](**common, initializer_range=0.1, tie_word_embeddings=True, **{**settings, **changes})
    return save_llm(folder, config, tokenizer)


def states(backbone: LLMBackbone, texts: list[str]) -> list[torch.Tensor]:
    with torch.no_grad():
        features = backbone(backbone.preprocess(texts))
    return [h[m.bool()] for h, m in zip(features["token_embeddings"], features["attention_mask"], strict=True)]


@pytest.mark.parametrize("name", [*BY_CONFIG, *BY_MASK])
def test_bidirectional_in_fact_and_the_same_alone_as_in_a_batch(tmp_path, name):
    backbone = LLMBackbone(llm(tmp_path, name)).eval()
    assert (backbone.config.is_causal is False) == (name in BY_CONFIG)
    before = states(backbone, TEXTS[:1])[0]
    assert len(before) > 12  # longer than any window here
    after = states(backbone, [TEXTS[0][:-4] + "cats"])[0]
    assert (before[0] - after[0]).abs().max() > 1e-4
    for side in ("left", "right"):
        backbone.tokenizer.padding_side = side
        for text, in_batch in zip(TEXTS, states(backbone, TEXTS), strict=True):
            torch.testing.assert_close(in_batch, states(backbone, [text])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*BY_CONFIG, *BY_MASK])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_structured_mask_is_honoured_exactly(tmp_path, name, attention):
    """A causal mask, given as a structured mask, on a model in either mode: what the causal model computes."""
    path = llm(tmp_path, name)
    backbone = LLMBackbone(path, attention=attention).eval()
    features = backbone.preprocess(TEXTS[:1])
    seq = features["input_ids"].shape[1]
    causal = torch.ones(1, seq, seq, dtype=torch.bool).tril()
    with torch.no_grad():
        masked = backbone({**features, "structured_mask": causal})["token_embeddings"]
    # Oracle: token by token, each prefix alone, in a model whose windows are too wide to matter.
    wide = {"sliding_window": 100} if "sliding_window" in {**BY_CONFIG, **BY_MASK}[name] else {}
    oracle = LLMBackbone(llm(tmp_path / "wide", name, **wide), attention="causal").eval()
    oracle.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        for length in (1, 5, seq):
            prefix = {k: v[:, :length] for k, v in features.items() if isinstance(v, torch.Tensor)}
            expected = oracle(prefix)["token_embeddings"][:, -1]
            torch.testing.assert_close(masked[:, length - 1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*BY_CONFIG, *BY_MASK])
def test_one_joint_pass_equals_two_prompted_passes(tmp_path, name):
    wide = {"sliding_window": 100} if "sliding_window" in {**BY_CONFIG, **BY_MASK}[name] else {}
    model = build_model(llm(tmp_path, name, **wide), "llara").eval()
    loss = PretextLoss(model)
    ids = [model.preprocess([text])["input_ids"][0].tolist() for text in TEXTS]
    joint = loss.join_prompts(ids, torch.device("cpu"))
    rows = torch.arange(len(TEXTS)).unsqueeze(1)
    with torch.no_grad():
        hidden = model[0](joint.features)["token_embeddings"]
    for prompt, positions in ((EBAE_PROMPT, joint.self_positions), (EBAR_PROMPT, joint.next_positions)):
        pooled = torch.nn.functional.normalize(hidden[rows, positions].squeeze(1), dim=-1)
        alone = model.encode(TEXTS, prompt=prompt, convert_to_tensor=True)
        torch.testing.assert_close(pooled, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_and_hybrid_models_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"'{name}' passes information between tokens outside its attention"):
        LLMBackbone(llm(tmp_path, name))


def test_layers_that_are_never_called_prove_nothing(tmp_path):
    model = AutoModel.from_pretrained(llm(tmp_path, "llama"))
    decoys = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    model._modules = {"decoys": decoys, **model._modules}  # found first: as many as there are layers
    with pytest.raises(ValueError, match="'llama' never calls its layers"):
        set_attention_mode(model, "bidirectional")


def test_encoders_are_refused(tmp_path):
    shape = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = AutoModel.from_config(BertConfig(**shape, hidden_size=32, intermediate_size=64))
    t5 = AutoModel.from_config(T5Config(vocab_size=99, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8))
    bart = AutoModel.from_config(BartConfig(vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1))
    for model, message in (
        (bert, "'bert' is an encoder: "),
        (t5, "'t5' is an encoder-decoder"),
        (bart, "'bart' is an encoder-decoder"),
    ):
        with pytest.raises(ValueError, match=message):
            set_attention_mode(model, "bidirectional")
    # Of a T5, sentence-transformers loads the encoder half.
    t5.save_pretrained(tmp_path)
    train_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'t5' is an encoder: "):
        LLMBackbone(str(tmp_path))


def test_masks_outside_attending_are_the_hosts(tmp_path):
    """Our hook in transformers' mask builder is there for good, and does nothing by itself."""
    path = llm(tmp_path, "nemotron")
    ids = torch.arange(3, 12).unsqueeze(0)
    untouched = AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        before = untouched(ids).last_hidden_state
        backbone = LLMBackbone(path).eval()  # by mask
        assert torch.equal(untouched(ids).last_hidden_state, before)
        assert torch.equal(backbone.model(ids).last_hidden_state, before)
        with attending(backbone.model, "bidirectional"):
            assert not torch.allclose(backbone.model(ids).last_hidden_state, before, atol=1e-3)


def test_a_mode_that_needs_the_backbones_code_is_published_with_it(tmp_path):
    """With stock modules gemma3 would reload as a causal model, and stablelm as one that is causal without padding."""
    for name in ("gemma3_text", "stablelm"):
        folder = save_sealed(build_model(llm(tmp_path / name, name), "mean"), tmp_path / f"{name}-sealed")
        types = [entry["type"] for entry in json.loads((folder / "modules.json").read_text())]
        assert types[0] == "llm_backbone.LLMBackbone" and (folder / "attention_mode.py").is_file()


def test_structured_masks_that_make_no_sense_are_refused(tmp_path):
    backbone = LLMBackbone(llm(tmp_path, "llama"))
    features = backbone.preprocess(["a cat"])
    seq = features["input_ids"].shape[1]
    for mask, message in (
        (torch.ones(1, seq, seq), "must be a boolean .* not torch.float32"),
        (torch.ones(1, 1, seq, seq, dtype=torch.bool), "must be a boolean"),
        (torch.ones(1, seq, seq + 1, dtype=torch.bool), "must be a boolean"),
        (torch.zeros(1, seq, seq, dtype=torch.bool), "lets token 0 of row 0 attend to nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            backbone({**features, "structured_mask": mask})


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_llm2vecs_bidirectional_models(shared, name, implementation):
    """arXiv 2404.05961; outputs of the original code on transformers 4.44.2."""
    folder = shared / "fixtures" / "bidirectional"
    stored = load_file(folder / f"{name}.safetensors")
    config = AutoConfig.for_model(**json.loads((folder / f"{name}.config.json").read_text()))
    model = AutoModel.from_config(config, attn_implementation=implementation).eval()
    weights = {key.removeprefix("weights."): value for key, value in stored.items() if key.startswith("weights.")}
    model.load_state_dict(weights)
    set_attention_mode(model, "bidirectional")
    rows = stored["input_ids"]
    full = torch.ones_like(rows)
    for side, mask in (("right", stored["mask_right"]), ("left", stored["mask_left"]), ("full", full), ("none", None)):
        with torch.no_grad():
            states = model(input_ids=rows, attention_mask=mask).last_hidden_state
        real = (full if mask is None else mask).bool()
        torch.testing.assert_close(states[real], stored[f"{side}.last_hidden_state"][real], atol=2e-5, rtol=0)
