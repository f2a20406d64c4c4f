"""A sealed model in llama.cpp: made ready for its converter, and embedded by llama-cpp-python (``llama_cpp.sh``).

    python gguf_model.py prepare MODEL FOLDER          a copy of MODEL that convert_hf_to_gguf.py takes
    python gguf_model.py embed MODEL FILE.gguf OUT     the texts of MODEL's reference.json under each prompt, as JSON

What to copy is in ``embed``: the pooling is named, as the GGUF of a Llama names none; the prompt is put before the
text; a long text is cut so that EOS stays, where ``embed(truncate=True)`` cuts EOS off.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

POOLINGS = {"mean": 1, "cls": 2, "lasttoken": 3}  # llama_cpp.LLAMA_POOLING_TYPE_...


def read(root: Path, name: str) -> dict:
    return json.loads((root / name).read_text(encoding="utf-8"))


def pooling_of(root: Path) -> int:
    """llama.cpp's number of the model's pooling. It has neither latent attention nor another module's code."""
    modules = [module["type"] for module in json.loads((root / "modules.json").read_text(encoding="utf-8"))]
    stock = len(modules) == 3 and all(name.startswith("sentence_transformers.") for name in modules)
    mode = read(root, "1_Pooling/config.json")["pooling_mode"] if stock else None
    if mode not in POOLINGS:
        given = f"pooling_mode={mode!r}" if stock else f"the modules {', '.join(modules)}"
        raise SystemExit(f"{root} has {given}. llama.cpp takes an LLM, a pooling of {', '.join(POOLINGS)}, Normalize.")
    return POOLINGS[mode]


def prepare(model: str, folder: str) -> None:
    """The converter knows a byte-level tokenizer by the ids of one text, and none with an EOS that was added: it goes
    out of tokenizer.json, and tokenizer_config.json says that llama.cpp shall add it."""
    pooling_of(Path(model))
    root = Path(shutil.copytree(model, folder))
    (root / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer, config = read(root, "tokenizer.json"), read(root, "tokenizer_config.json")
    processor = tokenizer["post_processor"] or {}
    for part in processor.get("processors", [processor]):
        if part.get("type") == "TemplateProcessing" and "SpecialToken" in part["single"][-1]:
            part["single"].pop()
            config["add_eos_token"] = True
    (root / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (root / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def embed(model: str, file: str, out: str) -> None:
    import llama_cpp

    root = Path(model)
    reference, longest = read(root, "reference.json"), read(root, "tokenizer_config.json")["model_max_length"]
    lengths = {"n_ctx": longest, "n_batch": longest, "n_ubatch": longest}  # a bidirectional text goes in one piece
    llm = llama_cpp.Llama(file, embedding=True, pooling_type=pooling_of(root), verbose=False, **lengths)

    def vector(text: str, prompt: str) -> list[float]:
        prompted = prompt + text
        while len(tokens := llm.tokenize(prompted.encode())) > longest:
            prompted = llm.detokenize(tokens[: longest - 1]).decode(errors="ignore")
        return llm.embed(prompted, normalize=True, truncate=False)

    vectors = {}
    for name, prompt in reference["prompts"].items():
        vectors[name] = [vector(text, prompt) for text in reference["texts"]]
    Path(out).write_text(json.dumps(vectors), encoding="utf-8")


if __name__ == "__main__":
    {"prepare": prepare, "embed": embed}[sys.argv[1]](*sys.argv[2:])
