"""The pretext losses on many architectures, by equivalence: one pass or two, either padding, one text or several."""

from __future__ import annotations

import pytest
import torch
from conftest import save_llm
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoModelForCausalLM

from examples.architectures.survey import tiny_config
from st_llm_embed import LLMBackbone, PretextLoss, PromptTokenPooling
from st_llm_embed.losses.pretext import bag_of_words_loss
from st_llm_embed.recipes import EBAE_PROMPT, EBAR_PROMPT

TEXT = ["the cat sat on the mat", "seven dogs", "even dogs were barking at the moon and the cat"]
NEXT = ["the quick brown fox", "", "sum of all numbers"]
# Of every large family; some with windows, shared experts, learned positions, ALiBi-free or interleaved layers.
MODEL_TYPES = (
    "llama mistral mixtral ministral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 phimoe gpt2 "
    "gpt_neox gptj codegen opt falcon olmo2 olmo3 cohere2 starcoder2 stablelm nemotron granite smollm3 glm4 exaone4 "
    "gpt_oss deepseek_v3 helium biogpt persimmon"
).split()


def separate(model: SentenceTransformer, head: torch.nn.Linear) -> dict[str, Tensor]:
    """The two losses by two passes of one text at a time, with the prompts of ``encode``."""
    parts = {}
    for name, prompt, targets in (("ebae", EBAE_PROMPT, TEXT), ("ebar", EBAR_PROMPT, NEXT)):
        states = [model[0](model.preprocess([text], prompt=prompt))["token_embeddings"][0, -1] for text in TEXT]
        bags = [sorted(set(model.tokenizer(target, add_special_tokens=False)["input_ids"])) for target in targets]
        parts[name] = bag_of_words_loss(head(torch.stack(states)), bags)
    return parts


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_one_pass_either_padding_any_batch(tmp_path, model_type):
    folder = save_llm(tmp_path, tiny_config(model_type))
    backbone = LLMBackbone(folder, attention="causal")
    model = SentenceTransformer(modules=[backbone, PromptTokenPooling(backbone.get_embedding_dimension())]).eval()
    head = AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings()
    loss = PretextLoss(model, lm_head=head)
    found = {}
    with torch.no_grad():
        for side in ("left", "right"):
            model.tokenizer.padding_side = side
            found[side] = loss([model.preprocess(TEXT), model.preprocess(NEXT)])
        alone = [
            loss([model.preprocess([text]), model.preprocess([following])])
            for text, following in zip(TEXT, NEXT, strict=True)
        ]
        found["one at a time"] = {
            "ebae": torch.stack([parts["ebae"] for parts in alone]).mean(),
            "ebar": torch.stack([alone[row]["ebar"] for row in (0, 2)]).mean(),
        }
        expected = separate(model, head)
    assert 4 < expected["ebae"] < 40
    for parts in found.values():
        torch.testing.assert_close(parts, expected, atol=1e-5, rtol=1e-5)
