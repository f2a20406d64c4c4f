"""An ONNX folder against the vectors that it must give: those of its ``reference.json``, or the model's own.

How far they may be apart follows from the graph's precision, as it is and not as the folder says.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from st_llm_embed.hub.checking import Checked, files_of, read_reference
from st_llm_embed.modules.reference import TEXTS
from st_llm_embed.serving.encode_onnx import OnnxEncoder
from st_llm_embed.serving.onnx_export import GRAPH, REFERENCE, TOLERANCES, check_installed
from st_llm_embed.trust import check_data, loading

MIXED = (
    *TEXTS,
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "",
    " ",
    "x\ny",
    "def f(x): return x ** 2",
    "🐈" * 9,
)


def check_onnx(root: Path) -> Checked:
    """``hub.check`` of a folder that ``export_onnx`` wrote, which ONNX Runtime runs in this process.

    Raises:
        FileNotFoundError: if it has no ``reference.json``.
        ImportError: if ONNX Runtime is not installed.
        ValueError: if it does not hold data alone, or a reference of another form.
        RuntimeError: if it gives other vectors.
    """
    check_installed()
    check_data(root)
    return Checked(compare_with_reference(root), files_of(root))


def compare_with_reference(root: Path) -> float:
    """Compare an ONNX folder with its own ``reference.json``.

    Returns:
        The largest difference of a component.

    Raises:
        FileNotFoundError: if the folder has none.
        ValueError: if it is of another form.
        RuntimeError: if the vectors are other ones.
    """
    if not (root / REFERENCE).is_file():
        raise FileNotFoundError(f"{root} has no {REFERENCE}, so there is nothing to compare it with. Export it anew.")
    reference = read_reference(root / REFERENCE)
    if missing := sorted(reference["embeddings"].keys() - reference["prompts"].keys()):
        raise ValueError(f"{root / REFERENCE} has vectors under prompts that it does not have: {missing}.")
    with loading(root):
        encoder = OnnxEncoder(root)
        vectors = {
            name: encoder.encode(reference["texts"], prompt=reference["prompts"][name])
            for name in reference["embeddings"]
        }
    return max(
        _compare(
            root,
            f"the texts of {REFERENCE} under the prompt {name!r}",
            vectors[name],
            np.array(expected, np.float32),
            reference["dtype"],
        )
        for name, expected in reference["embeddings"].items()
    )


def compare_with_model(root: Path, model: SentenceTransformer) -> None:
    """Compare an ONNX folder with the model that it was made of: the tokens of each text, and the vectors of texts of
    mixed lengths, one by one and together, under every prompt and none.

    Raises:
        RuntimeError: if they are other ones.
    """
    encoder = OnnxEncoder(root)
    for name, prompt in {**{name: prompt or "" for name, prompt in model.prompts.items()}, "": ""}.items():
        texts = []
        for text in MIXED:
            expected = model.preprocess([text], prompt=prompt or None)["input_ids"][0].tolist()
            if (ids := encoder.token_ids(text, prompt)) != expected:
                raise RuntimeError(
                    f"Under the prompt {name!r} the text {text[:40]!r} has the tokens {expected[:20]} in the model, "
                    f"and {ids[:20]} by the folder's tokenizer.json: a setting of its tokenizer is not kept there."
                )
            texts += [text] if expected else []
        vectors = model.encode(texts, prompt=prompt, show_progress_bar=False)
        where = f"mixed texts under the prompt {name!r}"
        _compare(root, where, encoder.encode(texts, prompt=prompt), vectors)
        _compare(root, f"{where}, one by one", encoder.encode(texts, prompt=prompt, batch_size=1), vectors)


def precision_of(root: Path) -> str:
    """``float32``, ``float16`` or ``int8``: what the graph computes in."""
    import onnx

    graph = onnx.load(root / GRAPH, load_external_data=False).graph
    if any(node.op_type == "MatMulNBits" for node in graph.node):
        return "int8"
    halves = any(weight.data_type == onnx.TensorProto.FLOAT16 for weight in graph.initializer)
    return "float16" if halves else "float32"


def _compare(root: Path, where: str, actual: np.ndarray, expected: np.ndarray, dtype: str = "float32") -> float:
    """The largest difference of vectors ``(texts, dim)`` in a component; ``dtype``: what the expected were made in."""
    precision = precision_of(root)
    tolerance = TOLERANCES[precision]
    if actual.shape != expected.shape:
        raise RuntimeError(f"{root} gives vectors of the shape {actual.shape}, and {expected.shape} are expected.")
    difference = float(np.abs(actual - expected).max())
    if "lowest_cosine" in tolerance:
        lengths = np.linalg.norm(actual, axis=1) * np.linalg.norm(expected, axis=1)
        cosine = float(((actual * expected).sum(axis=1) / lengths).min())
        is_right = cosine >= tolerance["lowest_cosine"]
        found = f"a cosine of {cosine:.3f}; at least {tolerance['lowest_cosine']} is rounding"
    else:
        largest = max(tolerance["largest_difference"], torch.finfo(getattr(torch, dtype)).eps)
        largest *= max(1.0, float(np.abs(expected).max()))
        is_right = difference <= largest
        found = f"a difference of {difference:.1e}; at most {largest:.0e} is rounding"
    if not is_right:
        raise RuntimeError(f"{root} gives other vectors than the model, in {precision}: of {where}, {found}.")
    return difference
