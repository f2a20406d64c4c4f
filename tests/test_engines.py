"""What other engines make of a sealed folder: the right vectors, or none.

Each engine is here as the rules by which it reads a folder (vLLM 0.32, Text Embeddings Inference 1.9.3, llama.cpp's
converter; files and lines in the serving guide): what it serves, or that it refuses. Whatever it serves must be what
sentence-transformers does. The engines themselves are run by ``examples/serving``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import DENSE, TEXTS, save_llm, train_tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Normalize, Pooling
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    MistralConfig,
    OlmoConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

from st_llm_embed import build_model
from st_llm_embed.hub import seal
from st_llm_embed.hub.engine_keys import engines
from st_llm_embed.modules import LatentAttentionPooling, LLMBackbone
from st_llm_embed.recipes import RECIPES

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
LLMS = {
    "llama": None,
    "mistral": MistralConfig(**SIZES, vocab_size=512, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES, vocab_size=512, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, vocab_size=512),
    "gemma2": Gemma2Config(**SIZES, vocab_size=512, sliding_window=8),
    "gemma3": Gemma3TextConfig(**SIZES, vocab_size=512, sliding_window=8),
    "smollm3": SmolLM3Config(**SIZES, vocab_size=512),
    "phi3": Phi3Config(**{**SIZES, "num_key_value_heads": 4}, vocab_size=512, sliding_window=8),
    "gpt_neox": GPTNeoXConfig(**SIZES, vocab_size=512),
    "olmo": OlmoConfig(**SIZES, vocab_size=512),
    "stablelm": StableLmConfig(**SIZES, vocab_size=512),  # which no configuration makes bidirectional
}
FEW = ("llama", "gemma2", "gemma3")


class Served(NamedTuple):
    """How an engine makes a vector of a text."""

    bidirectional: bool
    windows: tuple[int, ...]  # of the layers' attention, but for open ones
    pooling: str
    dense: int
    unit_length: bool | None  # None: as each request asks
    longest: int | None  # tokens that it takes


class Refused(Exception):
    """It does not start."""


def read(folder: Path, name: str) -> Any:
    file = folder / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def sliding(config: dict[str, Any]) -> tuple[int, ...]:
    window = config.get("sliding_window")
    unused = config.get("use_sliding_window") is False or "sliding_attention" not in config.get(
        "layer_types", ["sliding_attention"]
    )
    return () if window is None or window > 10**6 or unused else (window,)


def by_vllm(folder: Path) -> Served:
    """vLLM 0.32.0: transformers_utils/config.py:970-1040 (modules), :55-69 (their names), model_executor/models/
    registry.py:1297 (architectures), config/model.py:2618 (length); llama.py:277, qwen2.py:254, qwen3.py:194,
    gemma3.py:165 with config.py:81 (mask)."""
    config = read(folder, "config.json")
    if config is None or config["model_type"] == "llm_backbone":
        raise Refused("AutoConfig does not know it")
    name = next((name for name in config["architectures"] if not name.startswith("SentenceTransformers")), None)
    if name is None:
        raise Refused("Model architectures are not supported")
    is_causal = config.get("is_causal", True)
    if name == "Gemma3TextModel":
        is_causal = not config["use_bidirectional_attention"]
    honours = name in ("LlamaModel", "Qwen2Model", "Qwen3Model", "Gemma3TextModel")
    modules = read(folder, "modules.json")
    types = [entry["type"] for entry in modules]
    pooling = "last"
    for entry in modules:
        if entry["type"] == "sentence_transformers.models.Pooling":
            for key, value in read(folder, f"{entry['path']}/config.json").items():
                named = value if key == "pooling_mode" and isinstance(value, str) else key if value is True else ""
                named = named.replace("pooling_mode_", "").split("_")[0].replace("lasttoken", "last")
                pooling = named if named in ("cls", "last", "mean") else pooling
    return Served(
        bidirectional=(honours and not is_causal) or name == "BertModel",
        windows=() if name == "BertModel" else sliding(config),
        pooling=pooling,
        dense=types.count("sentence_transformers.models.Dense"),
        unit_length="sentence_transformers.models.Normalize" in types,
        longest=(read(folder, "sentence_bert_config.json") or {}).get("max_seq_length"),
    )


def by_tei(folder: Path) -> Served:
    """Text Embeddings Inference 1.9.3: router/src/lib.rs:120-560 (files), backends/src/lib.rs:817 (modules),
    backends/candle/src/lib.rs:124 (model types), models/flash_mistral.rs:57, flash_qwen2.rs:72, flash_qwen3.rs:104,
    gemma3.rs:269 (mask)."""
    config = read(folder, "config.json")
    if config is None or config["model_type"] not in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "bert"):
        raise Refused("no such model_type")
    if config.get("use_sliding_window"):
        raise Refused("sliding window is not supported")
    settings = read(folder, "sentence_bert_config.json")
    if "max_seq_length" not in settings:
        raise Refused("missing field `max_seq_length`")
    pooling = read(folder, "1_Pooling/config.json")
    if pooling is None or not {"pooling_mode_cls_token", "pooling_mode_mean_tokens"} <= pooling.keys():
        raise Refused("missing field `pooling_mode_cls_token`")
    modes = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}
    mode = next((name for key, name in modes.items() if pooling.get(f"pooling_mode_{key}")), None)
    if mode is None:
        raise Refused("pooling config is not supported")
    types = [entry["type"] for entry in read(folder, "modules.json")]
    stock = [f"sentence_transformers.models.{name}" for name in ("Dense", "Normalize", "Pooling", "Transformer")]
    key_says = config.get("is_causal", True) if config["model_type"] == "qwen2" else None
    bidirectional = config.get("use_bidirectional_attention") is True if key_says is None else not key_says
    return Served(
        bidirectional=bidirectional or config["model_type"] == "bert",
        windows=() if config["model_type"] == "bert" else sliding(config),
        pooling=mode,
        dense=types.count(stock[0]) if set(types) <= set(stock) else 0,
        unit_length=None,
        longest=settings["max_seq_length"],
    )


def by_llama_cpp(folder: Path) -> Served:
    """llama.cpp's convert_hf_to_gguf.py: the first name in architectures chooses the class; is_causal and 1_Pooling
    are written into the file; dense layers are not."""
    config = read(folder, "config.json")  # which AutoConfig need not know
    if config is None or config["architectures"][0].startswith(("SentenceTransformers", "LLMBackbone")):
        raise Refused("Model is not supported")
    pooling = read(folder, "1_Pooling/config.json")
    modes = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}
    mode = next((name for key, name in modes.items() if pooling.get(f"pooling_mode_{key}")), None)
    if mode is None:
        raise Refused("Only MEAN, CLS, and LAST pooling types supported")
    is_bert = config["model_type"] == "bert"
    return Served(
        is_bert or not config.get("is_causal", True), () if is_bert else sliding(config), mode, 0, None, None
    )


def by_sglang(folder: Path) -> Served:
    """SGLang's python/sglang/srt/models/registry.py takes the classes' names; llama_embedding.py has this one."""
    config = read(folder, "config.json")
    if config is None or "MistralModel" not in config["architectures"]:
        raise Refused("Model architectures are not supported for now")
    return Served(False, sliding(config), "last", 0, True, None)


ENGINES = {"vLLM": by_vllm, "TEI": by_tei, "llama.cpp": by_llama_cpp, "SGLang": by_sglang}


def differences(served: Served, right: Served) -> list[str]:
    """What an engine does otherwise; not a length that it does not cut at by itself."""
    return [
        name
        for name, one, other in zip(Served._fields, served, right, strict=True)
        if one != other and not (name in ("unit_length", "longest") and one is None)
    ]


def expected(model: SentenceTransformer, bidirectional: bool) -> Served:
    """What sentence-transformers does."""
    kinds = [type(module).__name__ for module in model]
    pooling = getattr(model[1], "pooling_mode", kinds[1])
    return Served(
        bidirectional=bidirectional,
        windows=sliding(model.transformers_model.config.to_dict()),
        pooling={"lasttoken": "last"}.get(pooling, pooling) if isinstance(pooling, str) else str(pooling),
        dense=kinds.count("Dense"),
        unit_length="Normalize" in kinds,
        longest=model.max_seq_length,
    )


def assert_no_engine_is_silently_wrong(folder: Path, right: Served) -> list[str]:
    """The engines that serve it."""
    serving = []
    for name, reads in ENGINES.items():
        try:
            served = reads(folder)
        except Refused:
            continue
        assert not differences(served, right), (name, served, right)
        serving.append(name)
    assert serving == [name for name, found in engines(folder).items() if found == "right"]
    return serving


def seal_recipe(folder: Path, name: str, recipe: str, **changes: Any) -> tuple[Path, SentenceTransformer]:
    base = save_llm(folder / "base", LLMS[name], train_tokenizer())
    model = build_model(base, recipe, **changes)
    model.save_pretrained(str(folder / "sealed"))
    seal(folder / "sealed")
    return folder / "sealed", model


@pytest.mark.parametrize("recipe", DENSE)
@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in LLMS])
def test_every_engine_serves_a_recipe_rightly_or_refuses_it(name, recipe, tmp_path):
    for window in ("full", "keep"):
        folder, model = seal_recipe(tmp_path / window, name, recipe, window=window)
        right = expected(model, model[0].attention == "bidirectional")
        serving = assert_no_engine_is_silently_wrong(folder, right)
        is_plain = RECIPES[recipe].pooling is Pooling and right.pooling in ("mean", "last") and "llara" not in recipe
        if is_plain and name in ("llama", "qwen3"):
            assert serving == ["vLLM", "TEI", "llama.cpp"]


@pytest.mark.parametrize("recipe", [name for name in DENSE if RECIPES[name].pooling is not Pooling])
def test_plain_transformers_refuses_what_it_would_pool_otherwise(recipe, tmp_path):
    folder, _ = seal_recipe(tmp_path, "llama", recipe)
    with pytest.raises(ValueError, match="llm_backbone|LLMBackboneConfig"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "mistral"])
def test_a_window_is_as_wide_in_the_third_generation(name, tmp_path):
    folder, model = seal_recipe(tmp_path, name, "mean", window="keep")
    vectors = model.encode(TEXTS)
    for number in range(3):
        again = SentenceTransformer(str(folder), trust_remote_code=True)
        assert abs(again.encode(TEXTS) - vectors).max() < 1e-6
        folder = tmp_path / f"generation-{number}"
        again.save_pretrained(str(folder))


def heads(kind: str, width: int) -> list[torch.nn.Module]:
    """What stands after the LLM."""
    modes: dict[str, Any] = {"two poolings": ("mean", "max"), "largest": "max", "weighted": "weightedmean"}
    pooling = Pooling(width, modes.get(kind, "mean"))
    wide = width * 2 if kind == "two poolings" else width
    further: dict[str, list[torch.nn.Module]] = {
        "dense": [Dense(wide, 8), Normalize()],
        "no unit length": [],
        "a layer norm": [LayerNorm(wide), Normalize()],
        "unit length before dense": [Normalize(), Dense(wide, 8)],
        "rectified": [Dense(wide, 8, activation_function=torch.nn.ReLU()), Normalize()],
    }
    return [pooling, *further.get(kind, [Normalize()])]


ALL = ["vLLM", "TEI", "llama.cpp"]
SERVED = {"dense": ["vLLM", "TEI"], "no unit length": ALL, "lower case": ALL}  # the tokenizer's file has the latter


@pytest.mark.parametrize(
    "kind",
    ["dense", "no unit length", "two poolings", "largest", "weighted", "a layer norm", "rectified"]
    + ["unit length before dense", "lengths by side", "lower case"],
)
def test_modules_that_an_engine_has_not_are_refused(kind, llm, tmp_path):
    backbone = LLMBackbone(llm, do_lower_case=kind == "lower case")
    if kind == "lengths by side":
        backbone.query_length = 16
    model = SentenceTransformer(modules=[backbone, *heads(kind, 32)])
    model.save_pretrained(str(tmp_path / "sealed"))
    seal(tmp_path / "sealed")
    serving = assert_no_engine_is_silently_wrong(tmp_path / "sealed", expected(model, bidirectional=True))
    assert serving == SERVED.get(kind, []), serving
    again = SentenceTransformer(str(tmp_path / "sealed"))
    assert abs(again.encode(TEXTS) - model.encode(TEXTS)).max() < 1e-6


def test_a_pooling_with_code_of_its_own_behind_a_stock_transformer_is_refused(llm, tmp_path):
    """Engines that pass over what they do not know would take the last token."""
    transformer = Transformer(
        llm,
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    )
    SentenceTransformer(modules=[transformer, LatentAttentionPooling(32), Normalize()]).save_pretrained(str(tmp_path))
    seal(tmp_path)
    assert read(tmp_path, "config.json")["architectures"] == ["SentenceTransformersLlamaModel"]
    assert set(engines(tmp_path).values()) == {"refused"}


def test_an_encoder_and_its_chat_template_become_what_engines_read(tmp_path):
    tokenizer = train_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    BertModel(
        BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=512)
    ).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    transformer = Transformer(
        str(tmp_path / "bert"),
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    )
    model = SentenceTransformer(modules=[transformer, Pooling(32), Normalize()])
    model.save_pretrained(str(tmp_path / "sealed"))
    seal(tmp_path / "sealed")
    right = expected(model, bidirectional=True)
    assert assert_no_engine_is_silently_wrong(tmp_path / "sealed", right._replace(windows=())) != []
    assert not (tmp_path / "sealed" / "chat_template.jinja").exists()


def test_sealing_twice_changes_nothing(tmp_path):
    folder, _ = seal_recipe(tmp_path, "gemma2", "mean")
    contents = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert read(folder, "config.json")["architectures"] == ["SentenceTransformersGemma2Model"]
    seal(folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == contents


def test_no_chat_template_of_the_base_is_left(tmp_path):
    tokenizer = train_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    base = save_llm(tmp_path / "base", tokenizer=tokenizer)
    for recipe in ("mean", "nv-embed"):
        build_model(base, recipe).save_pretrained(str(tmp_path / recipe))
        assert not (tmp_path / recipe / "chat_template.jinja").exists()
        assert read(tmp_path / recipe, "tokenizer_config.json").get("chat_template") is None
