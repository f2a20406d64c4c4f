"""Every architecture is bidirectional in fact, or refused; windows open, padding invisible, structured masks exact."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import save_llm, train_tokenizer
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel, BartConfig, BertConfig, T5Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from examples.architectures.survey import tiny_config
from st_llm_embed import LLMBackbone, PretextLoss, build_model
from st_llm_embed.hub import save_sealed
from st_llm_embed.modules.attention_mask import attending
from st_llm_embed.modules.attention_mode import set_attention_mode
from st_llm_embed.recipes import EBAE_PROMPT, EBAR_PROMPT

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
CHUNKS = {"attention_chunk_size": 4, "layer_types": ["chunked_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
BY_CONFIG = {
    "llama": SHAPE,
    "mistral": {**SHAPE, **WINDOW},
    "qwen2": SHAPE,
    "qwen3": HEADS,
    "gemma": HEADS,
    "gemma2": {**HEADS, **PATTERN},
    "gemma3_text": {**HEADS, **PATTERN},
    "cohere2": {**SHAPE, **PATTERN},
    "olmo3": {**SHAPE, **PATTERN},
    "ministral": {**HEADS, **PATTERN},
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
BY_MASK = {"stablelm": SHAPE, "nemotron": SHAPE, "llama4_text": {**HEADS, **CHUNKS, **EXPERTS}}
TEXTS = ["the cat sat on the mat while seven dogs were barking at the moon", "dogs", "a quick brown fox jumped over"]


def llm(folder, name: str, **changes) -> str:
    tokenizer = train_tokenizer()
    common = {"vocab_size": len(tokenizer) + 8, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    settings = {**BY_CONFIG, **BY_MASK}[name]
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
    backbone = LLMBackbone(path, attention=attention, window="full").eval()
    features = backbone.preprocess(TEXTS[:1])
    seq = features["input_ids"].shape[1]
    causal = torch.ones(1, seq, seq, dtype=torch.bool).tril()
    with torch.no_grad():
        masked = backbone({**features, "structured_mask": causal})["token_embeddings"]
    # Oracle: token by token, each prefix alone, in a model whose windows are too wide to matter.
    settings = {**BY_CONFIG, **BY_MASK}[name]
    wide = {key: 100 for key in ("sliding_window", "attention_chunk_size") if key in settings}
    oracle = LLMBackbone(llm(tmp_path / "wide", name, **wide), attention="causal").eval()
    oracle.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        for length in (1, 5, seq):
            prefix = {k: v[:, :length] for k, v in features.items() if isinstance(v, torch.Tensor)}
            expected = oracle(prefix)["token_embeddings"][:, -1]
            torch.testing.assert_close(masked[:, length - 1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", ["full", "keep"])
@pytest.mark.parametrize("name", [*BY_CONFIG, *BY_MASK])
def test_one_joint_pass_equals_two_prompted_passes(tmp_path, name, window):
    """Also where the LLM keeps its windows of 4 tokens: they are measured by position, not by column."""
    model = build_model(llm(tmp_path, name), "llara", window=window).eval()
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


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_kept_windows_are_symmetric_or_causal(tmp_path, attention):
    """Oracle: the same weights with the windows open, under a structured mask that draws them."""
    path = llm(tmp_path, "mistral")
    kept = LLMBackbone(path, attention=attention, window="keep").eval()
    assert kept.config.sliding_window == 4
    full = LLMBackbone(path, attention=attention, window="full").eval()
    assert full.config.sliding_window is None
    features = kept.preprocess(TEXTS[:1])
    column = torch.arange(features["input_ids"].shape[1])
    distance = column.unsqueeze(1) - column
    # transformers counts the edge of a bidirectional window in.
    drawn = distance.abs() <= 4 if attention == "bidirectional" else (distance >= 0) & (distance < 4)
    with torch.no_grad():
        expected = full({**features, "structured_mask": drawn.unsqueeze(0)})["token_embeddings"]
        torch.testing.assert_close(kept(dict(features))["token_embeddings"], expected, atol=1e-5, rtol=1e-5)
        assert (full(dict(features))["token_embeddings"] - expected).abs().max() > 1e-3


def test_kept_chunks_are_bidirectional_within(tmp_path):
    path = llm(tmp_path, "llama4_text", num_hidden_layers=1, layer_types=["chunked_attention"])
    backbone = LLMBackbone(path, window="keep").eval()
    assert backbone.config.attention_chunk_size == 4 and backbone.config.is_causal  # by mask
    before = states(backbone, TEXTS[:1])[0]
    ids = backbone.preprocess(TEXTS[:1])
    ids["input_ids"][0, 6] = 40  # the second chunk is 4, 5, 6, 7
    with torch.no_grad():
        after = backbone(ids)["token_embeddings"][0]
    assert [i for i, moved in enumerate((before - after).abs().amax(dim=1) > 1e-6) if moved] == [4, 5, 6, 7]


def test_open_windows_reload_without_our_code(tmp_path):
    """What the config can do is in config.json: stock modules give the same vectors."""
    for name in ("gemma3_text", "mistral"):
        model = build_model(llm(tmp_path / name, name), "mean")
        folder = save_sealed(model, tmp_path / f"{name}-sealed")
        assert not list(folder.glob("*.py"))
        again = SentenceTransformer(str(folder))
        assert type(again[0]).__module__.startswith("sentence_transformers.")
        torch.testing.assert_close(
            again.encode(TEXTS, convert_to_tensor=True), model.encode(TEXTS, convert_to_tensor=True), atol=1e-6, rtol=0
        )


def test_without_the_probe_the_saved_config_is_believed(tmp_path):
    path = llm(tmp_path, "llama")
    proven, unproven = LLMBackbone(path).eval(), LLMBackbone(path, probe=False).eval()
    assert proven.config.is_causal is False and unproven.config.is_causal is True  # by mask, to be sure
    torch.testing.assert_close(states(unproven, TEXTS[:1])[0], states(proven, TEXTS[:1])[0], atol=1e-6, rtol=0)
    proven.probe = False
    proven.save(str(tmp_path / "saved"))
    again = LLMBackbone.load(str(tmp_path / "saved"))
    assert again.probe is False and again.config.is_causal is False


@pytest.mark.parametrize("name", ["olmo_hybrid", "falcon_h1", "zaya", "deepseek_v4", "mamba"])
def test_recurrent_and_hybrid_models_are_refused(name):
    """A recurrence between attention layers, beside the attention or inside it, summaries, recurrence alone."""
    model = AutoModel.from_config(tiny_config(name), attn_implementation="eager")
    way_out = r"Build it causal, by the recipe 'last-token' \(attention='causal'\), or choose another base\."
    with pytest.raises(ValueError, match=f"'{name}' passes information between tokens other than by .*{way_out}"):
        set_attention_mode(model, "bidirectional")
    set_attention_mode(AutoModel.from_config(tiny_config(name), attn_implementation="eager"), "causal", window="keep")


def test_layers_that_are_never_called_prove_nothing(tmp_path):
    model = AutoModel.from_pretrained(llm(tmp_path, "llama"))
    model.decoys = torch.nn.ModuleList(
        [torch.nn.Sequential(torch.nn.Identity()) for _ in range(3)]
    )  # more than layers
    with pytest.raises(ValueError, match="'llama' never calls its layers"):
        set_attention_mode(model, "bidirectional")


def test_encoders_are_refused(tmp_path):
    shape = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = AutoModel.from_config(BertConfig(**shape, hidden_size=32, intermediate_size=64))
    t5 = AutoModel.from_config(T5Config(vocab_size=99, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8))
    bart = AutoModel.from_config(BartConfig(vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1))
    for model, message in (
        (bert, "'bert' is an encoder, "),
        (t5, "'t5' is an encoder-decoder"),
        (bart, "'bart' is an encoder-decoder"),
    ):
        with pytest.raises(ValueError, match=message):
            set_attention_mode(model, "bidirectional")
    # Of a T5, sentence-transformers loads the encoder half.
    t5.save_pretrained(tmp_path)
    train_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'t5' is an encoder, "):
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
    """With stock modules stablelm would reload as a model that is causal without padding, llama4 as a causal one."""
    for name in ("llama4_text", "stablelm"):
        folder = save_sealed(build_model(llm(tmp_path / name, name), "mean"), tmp_path / f"{name}-sealed")
        types = [entry["type"] for entry in json.loads((folder / "modules.json").read_text())]
        assert types[0] == "llm_backbone.LLMBackbone" and (folder / "attention_mode.py").is_file()


def test_structured_masks_that_make_no_sense_are_refused(tmp_path):
    backbone = LLMBackbone(llm(tmp_path, "llama"))
    features = backbone.preprocess(["a cat"])
    seq = features["input_ids"].shape[1]
    for mask, message in (
        (torch.ones(1, seq, seq), "must be a boolean .* not torch.float32"),
        (torch.ones(1, 1, seq, seq, dtype=torch.bool), "does not fit the batch"),
        (torch.ones(1, seq, seq + 1, dtype=torch.bool), "does not fit the batch"),
        (torch.ones(2, seq, seq, dtype=torch.bool), rf"with \(batch, seq\) = \(1, {seq}\)"),
        (torch.ones(1, seq + 1, seq + 1, dtype=torch.bool), "does not fit the batch"),
        (torch.zeros(1, seq, seq, dtype=torch.bool), "lets token 0 of row 0 attend to nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            backbone({**features, "structured_mask": mask})
    with pytest.raises(
        ValueError, match=rf"position_ids \(1, {seq - 1}\) do not fit the batch: they must be \(1, {seq}\)"
    ):
        backbone({**features, "position_ids": torch.arange(seq - 1).unsqueeze(0)})


def test_positions_that_an_llm_does_not_take_are_refused(tmp_path):
    config = CONFIG_MAPPING["bloom"](vocab_size=710, hidden_size=32, n_layer=2, n_head=4)
    backbone = LLMBackbone(save_llm(tmp_path, config))
    features = backbone.preprocess(["a cat"])
    with pytest.raises(ValueError, match="'bloom' counts positions by itself and takes no position_ids"):
        backbone({**features, "position_ids": torch.zeros_like(features["input_ids"])})


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
