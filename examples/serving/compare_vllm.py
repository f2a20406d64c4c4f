"""Compare a vLLM server's vectors with ``encode``: prompts, endpoints, lengths and batches mixed.

For each folder a server is started on loopback by another environment's Python, and stopped. ``vllm.sh`` makes that
environment and calls this.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer

from examples.demo.llm import bundled_llm
from st_llm_embed import build_model
from st_llm_embed.convert import convert_nv_embed
from st_llm_embed.hub import save_sealed

WORDS = Path(__file__).read_text(encoding="utf-8").split()
TEXTS = [
    *(
        "a",
        "apple pie",
        "are cats animals?",
        " a leading space",
        "two\nlines",
        "日本語 café 🙂",
        '"quoted," he said.',
        "(1) x.",
    ),
    *(" ".join(WORDS[start : start + length]) for start, length in enumerate((3, 7, 20, 50, 90, 140))),
]
TOO_LONG = "word " * 3000
QUERY = "Instruct: find the passage that answers the question\nQuery: "
NV_EMBED = Path(__file__).parents[3] / "shared" / "fixtures" / "nvembed_tiny"


def build_folders(root: Path) -> None:
    """One sealed folder of each recipe, of the first six layers of a real LLM; and a converted NV-Embed."""
    for recipe in ("nv-embed", "mean", "last-token", "llara", "llara-release"):
        if not (root / recipe).exists():
            torch.manual_seed(0)
            model = build_model(bundled_llm(), recipe, num_layers=6, max_seq_length=512)
            if not model.prompts["query"]:
                model.prompts = {"query": QUERY, "document": ""}
            save_sealed(model, root / recipe)
    if NV_EMBED.is_dir() and not (root / "converted").exists():
        with tempfile.TemporaryDirectory() as wide:
            widen_heads(NV_EMBED, Path(wide))
            convert_nv_embed(wide, root / "converted")


def widen_heads(source: Path, target: Path) -> None:
    """The same NV-Embed checkpoint with heads of twice the width: vLLM computes none of 16 on a CPU.

    What is new is zero. The old places go to every second new one, where rotary positions turn by the same angles; the
    queries make up for the scale, which goes by the width.
    """
    shutil.copytree(source, target, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    old = config["text_config"]["hidden_size"] // config["text_config"]["num_attention_heads"]
    config["text_config"]["head_dim"] = 2 * old
    (target / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")):
            weights[name] = widen(weight, old) * np.float32(2**0.5 if "q_proj" in name else 1)
        elif name.endswith("self_attn.o_proj.weight"):
            weights[name] = np.ascontiguousarray(widen(weight.T, old).T)
    save_file(weights, target / "model.safetensors")


def widen(weight: np.ndarray, old: int) -> np.ndarray:
    """``(heads * old, dim)`` to ``(heads * 2 * old, dim)``, zero between."""
    rows = weight.reshape(-1, old, 1, weight.shape[1])
    return np.concatenate([rows, np.zeros_like(rows)], axis=2).reshape(-1, weight.shape[1])


@contextmanager
def server(python: Path, folder: Path, *arguments: str) -> Iterator[str]:
    """A running vLLM server of a folder, by its address.

    Raises:
        RuntimeError: if it does not start; with what it wrote last.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--runner", "pooling"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "served", "--enforce-eager"]
    command += ["--gpu-memory-utilization", "0.2", *arguments]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    log = folder.parent / f"{folder.name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **quiet})
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"vLLM did not start on {folder}:\n" + log.read_text()[-3000:])
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def post(url: str, **body: Any) -> dict[str, Any]:
    """The JSON answer to a request.

    Raises:
        RuntimeError: if it is refused; with the message.
    """
    request = urllib.request.Request(url, json.dumps({"model": "served", **body}).encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{error.code}: {error.read().decode()}") from error


def embeddings(url: str, texts: list[str], **body: Any) -> np.ndarray:
    """``(texts, dim)`` by ``/v1/embeddings``."""
    data = post(f"{url}/v1/embeddings", input=texts, encoding_format="float", **body)["data"]
    return np.array([row["embedding"] for row in sorted(data, key=lambda row: row["index"])])


def embed(url: str, texts: list[str], **body: Any) -> np.ndarray:
    """``(texts, dim)`` by ``/v2/embed``."""
    return np.array(post(f"{url}/v2/embed", texts=texts, embedding_types=["float"], **body)["embeddings"]["float"])


def in_batches(ask: Any, url: str, texts: list[str], **body: Any) -> np.ndarray:
    """The same in requests of 1, 3 and the other texts at once, which the server mixes."""
    parts = [texts[:1], texts[1:4], texts[4:]]
    with ThreadPoolExecutor(len(parts)) as threads:
        return np.concatenate(list(threads.map(lambda part: ask(url, part, **body), parts)))


def typed(prompt: str, text: str) -> str:
    """A text as a client sends it."""
    return prompt.replace("{text}", text) if "{text}" in prompt else prompt + text


def fitting(model: SentenceTransformer) -> list[str]:
    """The texts that a server does not refuse, under the model's prompts."""
    return [text for text in TEXTS if len(model.tokenizer(text)["input_ids"]) < model.max_seq_length - 60]


def compare(
    url: str, model: SentenceTransformer, exact: SentenceTransformer
) -> Iterator[tuple[str, str, float, float]]:
    """Endpoint, prompt, and the largest difference of a vector's element from ``encode`` in float32: the server's, and
    that of ``encode`` in the server's precision."""

    texts = fitting(model)

    def difference(served: np.ndarray, own: list[str], **how: Any) -> tuple[float, float]:
        expected = exact.encode(own, **how)
        rounded = model.encode(own, convert_to_tensor=True, **how).float().cpu().numpy()
        return float(np.abs(served - expected).max()), float(np.abs(rounded - expected).max())

    if model.default_prompt_name is None or not any("{text}" in prompt for prompt in model.prompts.values()):
        yield "/v1/embeddings", "none", *difference(in_batches(embeddings, url, texts), texts, prompt="")
    else:
        yield "/v1/embeddings", "default", *difference(in_batches(embeddings, url, texts), texts)
    for name, prompt in model.prompts.items():
        served = in_batches(embeddings, url, [typed(prompt, text) for text in texts])
        if prompt:
            yield "/v1/embeddings", name, *difference(served, texts, prompt=prompt)
        yield "/v2/embed", name, *difference(in_batches(embed, url, texts, input_type=name), texts, prompt=prompt)
        cut = embeddings(url, [typed(prompt, TOO_LONG)], truncate_prompt_tokens=-1)
        yield "/v1/embeddings, cut", name, *difference(cut, [TOO_LONG], prompt=prompt)
    try:
        embeddings(url, [TOO_LONG])
        yield "too long: NOT REFUSED", "", 1.0, 0.0
    except RuntimeError as error:
        assert str(error).startswith("400"), error


def original(url: str, case: str) -> float:
    """The largest difference from what the original NV-Embed gave."""
    spec = json.loads((NV_EMBED / "expected.json").read_text())["cases"][case]
    stored = load_file(NV_EMBED / "expected.safetensors")[f"{case}.embeddings"]
    served = in_batches(embeddings, url, [spec["instruction"] + text for text in spec["texts"]])
    return float(np.abs(served - stored).max())


def rates(url: str, model: SentenceTransformer) -> tuple[float, float]:
    """Texts a second: the server's, and ``encode``'s on the same cores. Medians of three turns."""
    prompt = model.prompts["query"]
    ours, theirs = [], []
    for turn in range(3):
        texts = [f"{turn} {i} {text}" for i in range(4) for text in fitting(model)]  # none that vLLM may have kept
        start = time.perf_counter()
        embeddings(url, [typed(prompt, text) for text in texts])
        middle = time.perf_counter()
        model.encode(texts, prompt=prompt)
        ours.append(middle - start)
        theirs.append(time.perf_counter() - middle)
    return len(texts) / float(np.median(ours)), len(texts) / float(np.median(theirs))


def main() -> None:
    """Build the folders where there are none, and print a table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("python", type=Path, help="the Python of an environment with vLLM and this package")
    parser.add_argument("root", type=Path, help="the folder of the models' folders")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", help="names of folders in ROOT")
    arguments = parser.parse_args()
    if not arguments.only:
        arguments.root.mkdir(exist_ok=True, parents=True)
        build_folders(arguments.root)
    names = arguments.only or sorted(path.name for path in arguments.root.iterdir() if path.is_dir())
    bad = 0
    print("| folder | dtype | endpoint | prompt | off by | encode in this dtype |\n" + "| --- " * 6 + "|", flush=True)
    for name in names:
        folder = arguments.root / name
        for dtype in arguments.dtype:
            model, exact = (
                SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", model_kwargs={"dtype": kind})
                for kind in (dtype, "float32")
            )
            with server(arguments.python, folder, "--dtype", dtype) as url:
                rows = list(compare(url, model, exact))
                if name == "converted" and dtype == "float32":
                    for case in ("noinstr", "instr"):
                        rows.append(("/v1/embeddings", f"{case}, the original's", original(url, case), 0.0))
                for endpoint, prompt, served, own in rows:
                    bad += served > (1e-5 if dtype == "float32" else 2 * own)
                    print(f"| {name} | {dtype} | {endpoint} | {prompt} | {served:.1e} | {own:.1e} |", flush=True)
                served, own = rates(url, model)
                print(f"| {name} | {dtype} | texts/s | query | {served:.1f} | {own:.1f} |", flush=True)
    raise SystemExit(f"{bad} differences are too large." if bad else 0)


if __name__ == "__main__":
    main()
