"""What other engines read of a folder of stock modules: keys by which they give its vectors, or refuse it.

vLLM, Text Embeddings Inference (TEI), llama.cpp's converter and SGLang read files that sentence-transformers does not,
and follow some of what it does: the mask by a key of ``config.json``, one of three poolings, dense layers, unit
length. Where they would pass over something, they find a name in ``architectures`` that they do not know, and TEI no
pooling that it knows; transformers does not read the name. The serving guide (``serving/README.md``) has the sources.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import LARGE_INTEGER

from st_llm_embed.files import read_json, write_json
from st_llm_embed.modules.attention_mode import ENCODERS
from st_llm_embed.modules.root_config import MODEL_TYPE
from st_llm_embed.trust import STOCK

# Names and keys that sentence-transformers still reads: vLLM before its pull request 54533 (issue 45995) and TEI 1.9
# look for these, and pool by the first key whose value is true, or as the LLM's own class does.
MODELS = "sentence_transformers.models"
POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
POOLINGS = ("cls", "mean", "lasttoken")
ACTIVATIONS = ("torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Tanh")  # TEI knows no other
# The LLMs whose mask follows a key: for vLLM 0.32 is_causal (Gemma 3: use_bidirectional_attention), for TEI 1.9
# use_bidirectional_attention (Qwen2: is_causal).
FOLLOWED = ("LlamaModel", "Qwen2Model", "Qwen3Model", "Gemma3TextModel")
# backends/candle/src/lib.rs of 1.9.3.
TEI_MODELS = (
    *("bert", "camembert", "deberta-v2", "distilbert", "gemma3_text", "llama", "mistral", "modernbert", "mpnet"),
    *("nomic_bert", "qwen2", "qwen3", "roberta", "xlm-roberta"),
)
REFUSED = "SentenceTransformers"  # before the name of a model that these engines would serve otherwise


def write_engine_keys(root: Path, modules: list[dict]) -> None:
    """Write the keys into a folder, and the names that engines know into ``modules``.

    Args:
        root: the folder of a model that begins with the stock ``Transformer``.
        modules: the content of its ``modules.json``.
    """
    settings = read_json(root / "sentence_bert_config.json")
    config = read_json(root / "config.json")
    bidirectional = config.get("is_causal") is False and config["model_type"] not in ENCODERS
    by_side = settings.get("query_length") or settings.get("document_length")
    names = list(dict.fromkeys(str(name).removeprefix(REFUSED) for name in config.get("architectures") or []))
    if "MistralModel" in names:
        # vLLM builds both by one class. SGLang pools the former by its last token, whatever the folder says.
        names = ["LlamaModel"]
    follows = _are_followed(root, modules) and not by_side and (not bidirectional or set(names) <= set(FOLLOWED))
    # llama.cpp's converter leaves dense layers out, and reads the first name; vLLM takes the first that it knows.
    has_dense = any(_class_of(entry) == "Dense" for entry in modules)
    refused = [] if follows and not has_dense else [REFUSED + name for name in names]
    config["architectures"] = refused + (names if follows else [])
    if bidirectional and follows:
        config["use_bidirectional_attention"] = True
    write_json(root / "config.json", config)
    longest = read_json(root / "tokenizer_config.json").get("model_max_length")
    if follows and isinstance(longest, int) and longest <= LARGE_INTEGER:
        settings["max_seq_length"] = longest
    write_json(root / "sentence_bert_config.json", settings)
    if follows:
        for entry in modules:
            entry["type"] = f"{MODELS}.{_class_of(entry)}"
        pooling = root / modules[1]["path"] / "config.json"
        content = read_json(pooling)
        write_json(pooling, {**{key: mode == _mode(content) for mode, key in POOLING_KEYS.items()}, **content})
    if set(settings.get("modality_config", {"text": {}})) == {"text"}:
        _forget_chat_template(root)


def engines(root: Path) -> dict[str, str]:
    """What other engines do with a sealed folder: ``"right"``, ``"plugin"`` (with this package's) or ``"refused"``."""
    config = read_json(root / "config.json") if (root / "config.json").is_file() else {}  # an adapter's is its base's
    names = config.get("architectures") or [REFUSED]
    refused = [name.startswith(REFUSED) for name in names]
    kind = config.get("model_type")
    if kind == MODEL_TYPE:
        return {"vLLM": "plugin", "TEI": "refused", "llama.cpp": "refused"}
    by_tei = kind in TEI_MODELS and not all(refused) and not config.get("use_sliding_window")
    found = {"vLLM": not all(refused), "TEI": by_tei, "llama.cpp": not refused[0]}
    return {engine: "right" if is_right else "refused" for engine, is_right in found.items()}


def _class_of(entry: dict) -> str:
    return entry["type"].rpartition(".")[2]


def _mode(pooling: dict[str, Any]) -> Any:
    """A pooling's mode, or modes, by its configuration of this or an older version of sentence-transformers."""
    modes = [mode for mode, key in POOLING_KEYS.items() if pooling.get(key)]
    return pooling.get("pooling_mode", modes[0] if len(modes) == 1 else modes)


def _are_followed(root: Path, modules: list[dict]) -> bool:
    """Do the engines have these modules, in this order: a pooling, dense layers, unit length?"""
    classes = [_class_of(entry) for entry in modules]
    plain = ["Transformer", "Pooling", *["Dense"] * classes.count("Dense")]
    stock = all(entry["type"].startswith(STOCK) for entry in modules)
    if not stock or classes not in (plain, [*plain, "Normalize"]):
        return False
    pooling, *dense = (read_json(root / entry["path"] / "config.json") for entry in modules[1 : len(plain)])
    return (
        _mode(pooling) in POOLINGS
        and pooling.get("include_prompt", True)
        and all(layer.get("activation_function") in ACTIVATIONS and not layer.get("use_residual") for layer in dense)
    )


def _forget_chat_template(root: Path) -> None:
    """Drop the LLM's template: vLLM's ``/v2/embed`` would put a prompt and its text into a chat."""
    (root / "chat_template.jinja").unlink(missing_ok=True)
    config: dict[str, Any] = read_json(root / "tokenizer_config.json")
    if config.pop("chat_template", None) is not None:
        write_json(root / "tokenizer_config.json", config)
