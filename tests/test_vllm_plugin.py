"""vLLM's plugin without vLLM: what it reads, how it pools and makes tokens, against the modules themselves."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, save_llm, train_tokenizer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import LlamaConfig

from st_llm_embed import LatentAttentionPooling, LLMBackbone, PromptTokenPooling, build_model
from st_llm_embed.hub import seal
from st_llm_embed.modules.text_pooling import pool_text
from st_llm_embed.serving.folder import DEFAULTS, read_folder
from st_llm_embed.serving.inner_config import LLMBackboneConfig
from st_llm_embed.serving.pooling import check_dense, check_pooling, pool, project
from st_llm_embed.serving.text_encoder import TextEncoder

DIM = 24
POOLINGS = {
    "latents": lambda: LatentAttentionPooling(DIM, num_latents=5, num_heads=4),
    "wide heads": lambda: LatentAttentionPooling(DIM, num_latents=5, num_heads=2, head_dim=40, mlp="gelu"),
    "no mlp": lambda: LatentAttentionPooling(DIM, num_latents=5, num_heads=3, mlp=None, normalize=True),
    "with prompt": lambda: LatentAttentionPooling(DIM, num_latents=5, num_heads=4, include_prompt=True),
    "last prompt token": lambda: PromptTokenPooling(DIM),
    "last prompt tokens": lambda: PromptTokenPooling(DIM, num_tokens=4),
    "mean": lambda: Pooling(DIM, pooling_mode="mean", include_prompt=False),
    "weightedmean": lambda: Pooling(DIM, pooling_mode="weightedmean", include_prompt=False),
    "lasttoken": lambda: Pooling(DIM, pooling_mode="lasttoken", include_prompt=False),
}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("make", POOLINGS.values(), ids=POOLINGS)
def test_pools_as_the_modules_do(make, left):
    """Texts of one to nine tokens; of some the first tokens are a prompt's, of one all."""
    module = make().eval()
    lengths, prompts = [5, 1, 9, 3, 2], [2, 0, 3, 3, 0]
    width = max(lengths)
    mask, instruction = torch.zeros(len(lengths), width).long(), torch.zeros(len(lengths), width).long()
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        start = width - length if left else 0
        mask[row, start : start + length] = 1
        instruction[row, start : start + prompt] = 1
    tokens = torch.randn(len(lengths), width, DIM)
    features = {"token_embeddings": tokens, "attention_mask": mask, "instruction_mask": instruction}
    if isinstance(module, Pooling):
        module.register_forward_hook(pool_text)
    config = module.get_config_dict()
    with torch.no_grad():
        expected = module(features)["sentence_embedding"]
        real = mask.bool()
        in_text = (instruction == 0)[real] | bool(config.get("include_prompt", True))
        name, weights = type(module).__name__, module.state_dict()
        pooled = pool(name, config, weights, tokens[real], torch.tensor(lengths), in_text)
    check_pooling(name, config)
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.Identity(), nn.Tanh(), None])
def test_projects_as_dense_does(bias, activation):
    dense = Dense(DIM, 7, bias=bias, activation_function=activation)
    pooled = torch.randn(3, DIM)
    check_dense(dense.get_config_dict())
    projected = project(dense.get_config_dict(), dense.state_dict(), pooled)
    torch.testing.assert_close(projected, dense({"sentence_embedding": pooled})["sentence_embedding"])


def test_refuses_what_it_does_not_compute():
    with pytest.raises(ValueError, match="pooling_mode='max' is not served. Served modes: mean, weightedmean, last"):
        check_pooling("Pooling", {"pooling_mode": "max"})
    with pytest.raises(ValueError, match="is not served"):
        check_pooling("Pooling", {"pooling_mode": ["mean", "lasttoken"]})
    config = Dense(4, 4).get_config_dict()
    for changed in ({"use_residual": True}, {"module_output_name": "x"}, {"activation_function": "mine.Swish"}):
        with pytest.raises(ValueError, match=f"Dense with {next(iter(changed))}="):
            check_dense({**config, **changed})


PROMPTS = {
    "query": "Instruct: find it\nQuery: ",
    "around": "{text} The next sentence:",
    "quoted": '"{text}", summarize the above passage: ',
    "before": "Passage:{text}",
    "spaced": "Passage: {text}",
}
AFTER_PROMPTS = [*TEXTS, "  two spaces", "Query: what?", '"', 'he said "no".', "The next sentence:"]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """LLMBackbones by tokenizer and ``add_eos``."""
    made = {}
    for byte_level in (True, False):
        for bos in (True, False):
            folder = save_llm(
                tmp_path_factory.mktemp("llm") / "llm", tokenizer=train_tokenizer(byte_level=byte_level, bos=bos)
            )
            for add_eos in (True, False, "nv-embed"):
                made[byte_level, bos, add_eos] = LLMBackbone(folder, add_eos=add_eos, max_seq_length=30, probe=False)
    return made


def test_makes_the_tokens_of_encode(backbones):
    """Typed around the text, put before it as an endpoint does, and under no prompt; cut and whole."""
    compared = 0
    for backbone in backbones.values():
        encoder = TextEncoder(backbone.tokenizer, PROMPTS, None, backbone.add_eos)
        for prompt in ("", *PROMPTS.values()):
            for max_length in (30, 400):
                backbone.max_seq_length = max_length
                features = backbone.preprocess(AFTER_PROMPTS, prompt=prompt or None)
                rows = zip(AFTER_PROMPTS, features["input_ids"], features["attention_mask"].bool(), strict=True)
                for text, ids, real in rows:
                    for typed in {
                        prompt + text,
                        prompt.replace("{text}", text) if "{text}" in prompt else prompt + text,
                    }:
                        assert encoder(typed, max_length) == ids[real].tolist(), (backbone.add_eos, prompt, typed)
                        compared += 1
    assert compared > 1500


def test_a_text_without_a_prompt_gets_the_default_one(backbones):
    tokenizer = backbones[True, True, True].tokenizer
    prompts = {"similarity": "{text} The original sentence:", "query": "{text} The next sentence:"}
    encoder = TextEncoder(tokenizer, prompts, "similarity", True)
    assert encoder.find_prompt("a cat") == ("", "a cat", " The original sentence:")
    assert encoder.find_prompt("a cat The next sentence:") == ("", "a cat", " The next sentence:")
    assert encoder.find_prompt("{text} The next sentence:a cat") == ("", "a cat", " The next sentence:")
    prefixes = {"query": "Query: ", "passage": "Passage: "}
    assert TextEncoder(tokenizer, prefixes, "query", True).find_prompt("a cat") == ("", "Query: a cat", "")
    assert TextEncoder(tokenizer, prefixes, "query", True).find_prompt("Passage: a") == ("", "Passage: a", "")
    # An endpoint that puts the empty prompt before a text gives the text.
    with_empty = TextEncoder(tokenizer, {**prefixes, "document": ""}, "query", True)
    assert with_empty.find_prompt("a cat") == ("", "a cat", "")


def test_a_prompt_without_room_is_refused(backbones):
    encoder = TextEncoder(backbones[True, True, True].tokenizer, PROMPTS, None, True)
    with pytest.raises(ValueError, match="leaves no room for text within 6"):
        encoder(PROMPTS["quoted"] + "a", 6)


@pytest.fixture(scope="module")
def sealed(llm, tmp_path_factory):
    model = build_model(llm, "nv-embed", num_latents=4, num_heads=2)
    model.prompts = {"query": "Query: ", "document": ""}
    model.insert(2, Dense(32, 8, activation_function=nn.Identity()))
    folder = tmp_path_factory.mktemp("sealed") / "model"
    model.save_pretrained(str(folder))
    seal(folder)
    return folder


def reader(folder: Path, **changed):
    """Read a folder's JSON files, some with another content; None for one that is not there."""

    def read(file: str):
        if file in changed:
            return changed[file]
        return json.loads((folder / file).read_text()) if (folder / file).is_file() else None

    return read


@pytest.mark.parametrize("module", [LLMBackbone, LatentAttentionPooling, PromptTokenPooling, Pooling, Dense])
def test_what_is_not_saved_is_the_modules_default(module):
    defaults = {name: argument.default for name, argument in inspect.signature(module).parameters.items()}
    assert DEFAULTS[module.__name__].items() <= defaults.items()


def test_reads_a_sealed_folder(sealed):
    folder = read_folder(reader(sealed))
    assert folder.pooling == "LatentAttentionPooling" and folder.pooling_config["num_latents"] == 4
    assert [config["out_features"] for _, config in folder.dense] == [8] and folder.normalize
    assert folder.prompts == {"query": "Query: ", "document": ""} and folder.default_prompt_name is None
    assert folder.backbone["attention"] == "bidirectional" and folder.backbone["add_eos"] is True


def test_refuses_other_modules_and_folders(sealed):
    modules = json.loads((sealed / "modules.json").read_text())
    mine = [modules[0], {**modules[1], "type": "my_pooling.MyPooling"}, *modules[2:]]
    for wrong in (mine, modules[1:], modules[:1], [*modules, modules[1]], None):
        with pytest.raises(ValueError, match="What is served is llm_backbone.LLMBackbone, a pooling"):
            read_folder(reader(sealed, **{"modules.json": wrong}))
    with pytest.raises(ValueError, match="The model has no tokenizer_config.json. Copy or upload its whole folder."):
        read_folder(reader(sealed, **{"tokenizer_config.json": None}))
    settings = json.loads((sealed / "sentence_bert_config.json").read_text())
    with pytest.raises(ValueError, match="lengths of their own"):
        read_folder(reader(sealed, **{"sentence_bert_config.json": {**settings, "query_length": 8}}))


def test_the_configuration_is_the_llms_own():
    inner = LlamaConfig(hidden_size=48, num_attention_heads=4, architectures=["LlamaModel"])
    inner.is_causal, inner.matryoshka_dimensions = False, [8, 16]
    config = LLMBackboneConfig.from_dict(
        {"model_type": "llm_backbone", "architectures": ["LLMBackbone"], "backbone_config": inner.to_dict()}
    )
    assert type(config) is LlamaConfig and config.hidden_size == 48 and config.is_causal is False
    assert config.architectures == ["LLMBackbone"] and config.backbone_architectures == ["LlamaModel"]
    assert config.matryoshka_dimensions == [8, 16]
    with pytest.raises(ValueError, match="does not know the LLM of type 'of_tomorrow'"):
        LLMBackboneConfig.from_dict({"backbone_config": {"model_type": "of_tomorrow", "architectures": ["X"]}})


def test_the_entry_point_imports_nothing():
    (found,) = entry_points(group="vllm.general_plugins", name="llm_backbone")
    assert found.value == "st_llm_embed.serving.vllm_plugin:register"
    code = "import sys, st_llm_embed.serving.vllm_plugin as plugin; plugin.register; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "vllm", "transformers", "sentence_transformers", "tokenizers"} & {*loaded}
