"""The attention mode survives what users do to a model: adapters, merging, dtypes, compiling, workers, flash."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TEXTS, save_llm
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from test_attention_mode import llm as build_llm
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from st_llm_embed import LLMBackbone, build_model

NAMES = ["llama", "stablelm"]  # bidirectional by config, by mask


def hears_the_end(model: SentenceTransformer) -> bool:
    """Does the first token move with the last word of the text?"""
    states = [model.encode(f"the cat sat on {end}", output_value="token_embeddings")[0] for end in ("mats", "dogs")]
    return bool((states[0] - states[1]).abs().max() > 1e-4)


def vectors(model: SentenceTransformer) -> torch.Tensor:
    return model.encode(TEXTS, convert_to_tensor=True).float().cpu()


@pytest.fixture(params=NAMES)
def model(request, tmp_path) -> SentenceTransformer:
    return build_model(build_llm(tmp_path / "llm", request.param), "mean").eval()


def add_adapter(model: SentenceTransformer) -> None:
    targets = ["q_proj", "v_proj"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def test_an_adapter_saved_by_itself(model, tmp_path):
    """The base's own config.json says nothing of the mode, and the adapter's folder has none."""
    plain = vectors(model)
    add_adapter(model)
    adapted = vectors(model)
    assert (adapted - plain).abs().max() > 1e-3 and hears_the_end(model)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = SentenceTransformer(str(tmp_path / "adapter"), trust_remote_code=True)
    assert hears_the_end(again)
    torch.testing.assert_close(vectors(again), adapted, atol=1e-5, rtol=0)


def test_a_merged_adapter(model, tmp_path):
    from peft import LoraModel

    backbone = model[0]
    merged = LoraModel(
        backbone.model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), "default"
    )
    adapted = vectors(model)
    backbone.model = merged.merge_and_unload()
    assert hears_the_end(model)
    torch.testing.assert_close(vectors(model), adapted, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "merged")
    again = SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=True)
    torch.testing.assert_close(vectors(again), adapted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(model, tmp_path, dtype):
    """Cast after loading, and proven in that precision at the next loading."""
    exact = vectors(model)
    model.to(getattr(torch, dtype))
    assert hears_the_end(model)
    cast = vectors(model)
    similarity = torch.nn.functional.cosine_similarity(cast, exact)
    assert similarity.min() > 0.999
    model.save_pretrained(tmp_path / "half")
    again = SentenceTransformer(str(tmp_path / "half"), trust_remote_code=True, model_kwargs={"dtype": dtype})
    assert again[0].model.dtype == getattr(torch, dtype) and hears_the_end(again)
    # What the LLM computes from its config is exact in both.
    torch.testing.assert_close(vectors(again), cast, atol=1e-6, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients(model):
    """Checkpointed layers run a second time after the forward pass, when our masks are no longer in force."""
    backbone = model[0].train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        backbone.zero_grad()
        backbone(backbone.preprocess(TEXTS))["token_embeddings"].square().mean().backward()
        gradients.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    assert max(gradient.abs().max() for gradient in gradients[0]) > 1e-6
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_training_with_gradient_checkpointing_takes_the_same_steps(llm, tmp_path, lora):
    """Through the trainer, which passes on what transformers' own models take."""
    data = Dataset.from_dict(
        {column: [f"{column} {i} " * i for i in range(1, 9)] for column in ("anchor", "positive")}
    )

    def steps(checkpointing: bool) -> list[tuple[float, float]]:
        torch.manual_seed(0)
        model = build_model(llm, "nv-embed", lora=lora, num_latents=4)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
        args = SentenceTransformerTrainingArguments(
            str(tmp_path), max_steps=2, gradient_checkpointing=checkpointing, learning_rate=1e-3, **quiet
        )
        trainer = SentenceTransformerTrainer(model, args, data, loss=MultipleNegativesRankingLoss(model))
        trainer.train()
        assert model[1].gradient_checkpointing == checkpointing
        return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]

    plain, checkpointed = steps(False), steps(True)
    assert len(plain) == 2 and plain[0][1] > 1e-3
    torch.testing.assert_close(torch.tensor(checkpointed), torch.tensor(plain), rtol=1e-4, atol=0)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_with_structured_masks_in_between(model, whole):
    """A compiled graph must not keep the mask of its first call."""
    torch._dynamo.reset()  # its limit of compilations is the whole process's
    features = model.preprocess(["the cat sat on the mat"])
    seq = features["input_ids"].shape[1]
    causal = torch.ones(1, seq, seq, dtype=torch.bool).tril()
    masks = [None, causal, causal.transpose(1, 2), None]

    def run(forward) -> list[torch.Tensor]:
        given = [{**features} if mask is None else {**features, "structured_mask": mask} for mask in masks]
        with torch.no_grad():
            return [forward(batch)["token_embeddings"] for batch in given]

    eager = run(model)
    assert (eager[0] - eager[1]).abs().max() > 1e-3 < (eager[1] - eager[2]).abs().max()
    graphs = []
    compiled = torch.compile(
        model if whole else model[0].model.forward, backend=lambda graph, inputs: graphs.append(graph) or graph.forward
    )
    if not whole:  # sentence-transformers calls the LLM's forward, not the LLM
        model[0].model.forward = compiled
    torch.testing.assert_close(run(compiled if whole else model), eager, atol=1e-5, rtol=1e-5)
    assert graphs


def test_max_seq_length_and_padding_side_may_change(model):
    long = " ".join(["a cat sat on the mat"] * 8)
    whole = vectors(model)
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        torch.testing.assert_close(vectors(model), whole, atol=1e-5, rtol=0)
    model.max_seq_length = 16
    assert model.tokenize([long])["input_ids"].shape[1] == 16
    assert model.tokenize([long])["input_ids"][0, -1] == model.tokenizer.eos_token_id
    assert hears_the_end(model)


@pytest.mark.slow
def test_encode_in_several_processes(tmp_path):
    model = build_model(build_llm(tmp_path, "stablelm"), "mean").eval()
    torch.testing.assert_close(
        torch.tensor(model.encode(TEXTS * 2, device=["cpu", "cpu"], batch_size=3, chunk_size=4)),
        vectors(model).repeat(2, 1),
        atol=1e-5,
        rtol=0,
    )


def reference_flash(module, query, key, value, attention_mask, scaling=None, is_causal=None, **kwargs):
    """What flash attention's variable-length kernels compute, text by text: ``(1, heads, tokens, dim)``."""
    causal = module.is_causal if is_causal is None else is_causal
    boundaries = kwargs["cu_seq_lens_q"].tolist()
    groups = query.shape[1] // key.shape[1]
    pieces = []
    for start, end in zip(boundaries, boundaries[1:], strict=False):
        q, k, v = (states[:, :, start:end] for states in (query, key, value))
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        pieces.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scaling))
    return torch.cat(pieces, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_flattened_batches_with_instructions(tmp_path, monkeypatch, attention, side):
    """Without a GPU, a reference in place of the kernels: the batch form, positions and masks around them are real."""
    AttentionInterface.register("flash_reference", reference_flash)
    AttentionMaskInterface.register("flash_reference", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    recipe = "nv-embed" if attention == "bidirectional" else "llara"
    model = build_model(save_llm(tmp_path), recipe, attention=attention).eval()
    model.tokenizer.padding_side = side
    prompt = "Query: " if recipe == "nv-embed" else None
    padded = model.encode(TEXTS, prompt=prompt, convert_to_tensor=True)
    backbone = model[0]
    backbone.model.config._attn_implementation = "flash_reference"
    backbone.can_flatten_inputs = True
    seen = []
    forward = backbone.model.forward
    monkeypatch.setattr(backbone.model, "forward", lambda **kwargs: seen.append(kwargs) or forward(**kwargs))
    flattened = model.encode(TEXTS, prompt=prompt, convert_to_tensor=True)
    assert seen[0]["input_ids"].shape[0] == 1 and len(seen[0]["cu_seq_lens_q"]) == len(TEXTS) + 1
    torch.testing.assert_close(flattened, padded, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="A structured mask needs sdpa or eager attention, not flash_reference"):
        features = backbone.preprocess(["a"])
        backbone({**features, "structured_mask": torch.ones(1, 3, 3, dtype=torch.bool)})


def test_the_policy_is_in_the_saved_files(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "sentence_bert_config.json").read_text())
    assert settings["attention"] == "bidirectional" and settings["window"] == "full" and settings["add_eos"]
    # A tokenizer that lost its EOS on the way gets it back.
    tokenizer = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (tmp_path / "saved" / "tokenizer.json").write_text(json.dumps(tokenizer))
    again = LLMBackbone.load(str(tmp_path / "saved"))
    assert again.preprocess(["a cat"])["input_ids"][0, -1] == again.tokenizer.eos_token_id
