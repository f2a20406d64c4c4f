"""vLLM itself with the plugin: tiny models of each recipe and several architectures, against ``encode``.

vLLM brings a transformers of its own and lives in an environment of its own, which ``examples/serving/vllm.sh`` makes.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXTS, save_llm, train_tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch import nn
from transformers import (
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
)

from st_llm_embed import LatentAttentionPooling, build_model
from st_llm_embed.hub import seal

ROOT = Path(__file__).parents[1]
VLLM = Path(os.environ.get("VLLM_VENV", ROOT / ".venv-vllm")) / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM.exists(), reason=f"no vLLM at {VLLM}: run examples/serving/vllm.sh, or set VLLM_VENV"),
]

# vLLM's attention on a CPU takes heads of 32 and more.
SIZES = {
    "vocab_size": 700,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
LLMS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=6),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=6),
    "granite": GraniteConfig(**SIZES),
    "olmo2": Olmo2Config(**SIZES),
}
NV_EMBED = {"num_latents": 4, "num_heads": 2}
QUERY = "Instruct: find it\nQuery: "


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Every case in one process of vLLM's environment, whose start takes the longest: what it gave, and ``encode``."""
    root = tmp_path_factory.mktemp("vllm")
    tokenizer = train_tokenizer()
    jobs, expected = {}, {}

    def add(case: str, llm: str, recipe: str, prompt: str = "", how: dict | None = None, **settings):
        """``how``: ``arguments`` of ``LLM``, of a ``request`` and of ``encode``; ``modules`` after the LLM."""
        how = how or {}
        torch.manual_seed(0)
        if not (base := root / llm).exists():
            save_llm(base, LLMS[llm], tokenizer)
        built = build_model(base, recipe, max_seq_length=64, **settings)
        prompts = built.prompts if recipe.startswith("llara") else {"query": QUERY, "document": ""}
        modules = [built[0], *how.get("modules", [*built][1:])]
        model = SentenceTransformer(modules=modules, prompts=prompts, default_prompt_name=built.default_prompt_name)
        model.transformers_model.config.matryoshka_dimensions = [8]
        folder = root / case
        model.save_pretrained(str(folder))
        seal(folder)
        prompt = prompts.get(prompt, prompt)
        typed = [prompt.replace("{text}", text) if "{text}" in prompt else prompt + text for text in TEXTS]
        keys = {key: how[key] for key in ("arguments", "request") if key in how}
        jobs[case] = {"folder": str(folder), "texts": typed, **keys}
        expected[case] = model.encode(TEXTS, prompt=prompt, **how.get("encode", {}))

    for llm in ("llama", "mistral", "qwen2", "qwen3", "gemma3"):
        add(f"nv-embed on {llm}", llm, "nv-embed", "query", **NV_EMBED)
    for llm in ("mistral", "gemma3"):
        add(f"symmetric windows on {llm}", llm, "nv-embed", "query", window="keep", **NV_EMBED)
    add("NV-Embed's counts", "llama", "nv-embed", "query", instruction_mask="nv-embed", add_eos="nv-embed", **NV_EMBED)
    add("no prompt", "llama", "nv-embed", **NV_EMBED)
    add(
        "another instruction",
        "llama",
        "nv-embed",
        "Another: ",
        {"arguments": {"hf_overrides": {"task_instructions": {"other": "Another: "}}}},
        **NV_EMBED,
    )
    add("llara", "llama", "llara", "query")
    add("llara-release", "mistral", "llara-release", "query")
    add("llara on olmo2", "olmo2", "llara", "similarity")
    add("weightedmean", "llama", "weightedmean", "query")
    add("mean", "llama", "mean", "query")
    add(
        "mean without the prompt",
        "llama",
        "mean",
        "query",
        {"modules": [Pooling(64, pooling_mode="mean", include_prompt=False)]},
    )
    dense = [LatentAttentionPooling(64, **NV_EMBED), Dense(64, 8, activation_function=nn.Tanh()), Normalize()]
    add("Dense", "llama", "nv-embed", "query", {"modules": dense, "arguments": {"max_num_seqs": 100}})
    add("bfloat16", "llama", "nv-embed", "query", {"arguments": {"dtype": "bfloat16"}}, **NV_EMBED)
    short = {"request": {"dimensions": 8}, "encode": {"truncate_dim": 8, "normalize_embeddings": True}}
    add("dimensions", "llama", "nv-embed", "query", short, **NV_EMBED)
    add("causal in vLLM", "granite", "nv-embed", "query", **NV_EMBED)
    add("causal in vLLM's use of transformers", "olmo2", "nv-embed", "query", **NV_EMBED)
    add(
        "last token by hand",
        "llama",
        "nv-embed",
        "query",
        {"arguments": {"pooler_config": {"pooling_type": "LAST"}}},
        **NV_EMBED,
    )
    add("prefix cache", "llama", "llara", "query", {"arguments": {"enable_prefix_caching": True}})
    add("chunked prefill", "llama", "llara", "query", {"arguments": {"enable_chunked_prefill": True}})
    add("mask by hand", "llama", "nv-embed", "query", {"arguments": {"hf_overrides": {"is_causal": True}}}, **NV_EMBED)
    add("plugin off", "llama", "nv-embed", "query", **NV_EMBED)

    def embed(cases: list[str], **environment: str) -> dict[str, dict]:
        (root / "jobs.json").write_text(json.dumps([jobs[case] for case in cases]))
        command = [str(VLLM), str(ROOT / "tests" / "vllm_jobs.py"), str(root / "jobs.json"), str(root / "done.json")]
        with (root / "log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, **environment})
        return dict(zip(cases, json.loads((root / "done.json").read_text()), strict=True))

    given = embed([case for case in jobs if case != "plugin off"])
    given |= embed(["plugin off"], VLLM_PLUGINS="none")
    return given, expected


SERVED = [
    *(f"nv-embed on {llm}" for llm in ("llama", "mistral", "qwen2", "qwen3", "gemma3")),
    *("symmetric windows on mistral", "symmetric windows on gemma3"),
    *("NV-Embed's counts", "no prompt", "another instruction", "llara", "llara-release", "llara on olmo2"),
    *("mean", "mean without the prompt", "Dense", "dimensions", "bfloat16"),
]


@pytest.mark.parametrize("case", SERVED)
def test_gives_the_vectors_of_encode(done, case):
    given, expected = done
    assert "error" not in given[case], given[case]["error"][:2000]
    difference = np.abs(np.array(given[case]["vectors"]) - expected[case]).max()
    assert difference < (2e-2 if case == "bfloat16" else 1e-5)


REFUSED = {
    "causal in vLLM": "The model is bidirectional, and vLLM's GraniteForEmbedding for GraniteModel is not (decoder)",
    "causal in vLLM's use of transformers": "vLLM's TransformersForEmbedding for Olmo2Model is not (decoder)",
    "weightedmean": "Model architectures ['SentenceTransformersLlamaModel'] are not supported",
    "last token by hand": "The model's own modules say how it pools",
    "prefix cache": "With --enable-prefix-caching the pooling would get a part of a text's tokens",
    "chunked prefill": "With --enable-chunked-prefill the pooling would get a part of a text's tokens",
    "mask by hand": "The model's own settings say how it attends. Leave is_causal out of --hf-overrides.",
    "plugin off": "llm_backbone",
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_would_be_other_vectors(done, case):
    assert REFUSED[case] in done[0][case]["error"]
