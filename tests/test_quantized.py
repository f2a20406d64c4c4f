"""QLoRA by bitsandbytes: the gradients of LoRA on the dequantized LLM, stages that go on, a merge that is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import save_llm
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from st_llm_embed import InstructionContrastiveLoss, build_model
from st_llm_embed.training import train_stages
from st_llm_embed.weights.merging import merge_adapter

bitsandbytes = pytest.importorskip("bitsandbytes")

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
TEXTS = ["the cat sat", "seven dogs were barking at the moon", "a fox"]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Where a CPU has AVX512-bf16, bitsandbytes packs weights anew to encode, and then gives no gradients."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


@pytest.fixture
def settings(tmp_path) -> dict:
    """Wide enough for blocks of 64 weights."""
    base = save_llm(tmp_path / "llm", hidden_size=64, intermediate_size=128)
    return {"base": base, "num_latents": 4, "lora": True, "model_kwargs": {"quantization_config": FOUR_BITS}}


def trained(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_gradients_are_those_of_lora_on_the_dequantized_llm(settings):
    quantized = build_model(**settings)
    plain = build_model(**{**settings, "model_kwargs": {}})
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in quantized.modules()) == 2 * 7
    with torch.no_grad():
        for packed, weight in zip(quantized.parameters(), plain.parameters(), strict=True):
            if packed.is_floating_point():
                if packed.requires_grad:
                    packed.add_(torch.randn_like(packed), alpha=0.1)  # LoRA begins at zero
                weight.copy_(packed)
            else:
                weight.copy_(bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state))
    gradients = []
    for model in (quantized, plain):
        model.eval()
        features = [model.preprocess(TEXTS, prompt="Instruct: find it\nQuery: "), model.preprocess(TEXTS[::-1])]
        InstructionContrastiveLoss(model)(features).backward()
        gradients.append({name: parameter.grad for name, parameter in trained(model).items()})
    assert gradients[0].keys() == gradients[1].keys() and any("lora_" in name for name in gradients[0])
    for name, gradient in gradients[1].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-6, rtol=1e-5)


def test_stages_go_on_and_what_they_leave_merges_into_the_plain_llm(settings, tmp_path):
    rows = {column: [f"{column} about cats number {i}" for i in range(8)] for column in ("anchor", "positive")}
    Dataset.from_dict(rows).to_json(tmp_path / "rows.jsonl")
    quiet = {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    read = {"read": "from_columns", "source": str(tmp_path / "rows.jsonl"), "instruction": "Find it"}
    config = {
        "output": str(tmp_path / "run"),
        "model": settings,
        "arguments": {**quiet, "max_steps": 4, "save_steps": 2},
        "data": {"docs": read},
        "stages": [{"name": "first", "data": ["docs"]}, {"name": "second", "data": ["docs"]}],
    }
    last = train_stages(config)
    whole = SentenceTransformer(str(last), trust_remote_code=True)
    assert not any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in whole.modules())
    before = trained(build_model(**settings))
    last.rename(tmp_path / "whole")
    (last.parent / "checkpoint-4").rename(tmp_path / "checkpoint-4")  # goes on from checkpoint-2
    assert train_stages(config) == last
    again = SentenceTransformer(str(last), trust_remote_code=True)
    after = again.state_dict()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)
    assert all((after[name] != weight).any() for name, weight in before.items())
    merge_adapter(again)
    model_kwargs = {"quantization_config": FOUR_BITS}
    with pytest.raises(ValueError, match="The LLM is quantized.*merge_adapter.SentenceTransformer.folder"):
        merge_adapter(SentenceTransformer(str(last), trust_remote_code=True, model_kwargs=model_kwargs))
