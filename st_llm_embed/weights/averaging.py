"""One model from several checkpoints of it: the mean of their weights, or a walk along the great circles between them.

Checkpoints of one run, or of runs that differ in data or seed, often do better averaged than any of them alone:
llama-embed-nemotron-8b (arXiv 2511.07025) takes the equal mean of six, Qwen3-Embedding (arXiv 2506.05176) slerp.
An LLM that was adapted to both sides forgets less half-way to the one that it was (BidirLM, arXiv 2604.02045): the
plain LLM is a checkpoint too.

In: folders that ``save_pretrained`` or the trainer wrote, of the same modules. Out: such a folder.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from st_llm_embed.encoding.ranges import RANGES
from st_llm_embed.files import check_empty, check_room, files_of, read_json, written_beside
from st_llm_embed.modules.first_layers import keep_first_layers
from st_llm_embed.modules.root_config import load_inner_config
from st_llm_embed.trust import OF_A_BASE, check_model, check_no_code, fetch, loading
from st_llm_embed.weights.gguf import unpack_gguf

METHODS = ("equal", "slerp")
# The trainer's state, and what describes the weights of the first only.
NOT_OF_THE_MODEL = ("*.pt", "*.pth", "*.bin", "trainer_state.json", "reference.json", RANGES)
SAME = (
    "modules.json",
    "config.json",
    "tokenizer.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)


def average_checkpoints(
    sources: Sequence[str | Path],
    output: str | Path,
    method: str = "equal",
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
) -> Path:
    """Average the weights of several saved models into one.

    Args:
        sources: two folders or more; one, where there is a base. What is not a weight comes from the first.
        output: the folder to write; must not exist, or be empty.
        method: ``"equal"`` for the mean (weighted, if ``weights`` are given), or ``"slerp"``: spherical interpolation,
            tensor by tensor and source by source, each by its share of the weights so far.
        weights: a positive number for each source, and the last for the base. Default: the same for all.
        base: the Hub id, folder or ``.gguf`` file of the plain LLM that the first was built from, as one more source.
            What the first has besides its LLM stays as it is.

    Returns:
        ``output``. Weights are averaged in float32 and kept in their own precision.

    Raises:
        ValueError: for fewer than two sources, an unknown method, weights that do not fit, an adapter alone, models
            that differ in their files, configuration, or tensors, or a base that cannot be loaded.
        FileExistsError: if ``output`` holds something.
        OSError: if ``output`` cannot be written, or its disk has no room for the model.
    """
    roots = [Path(source) for source in sources]
    count = len(roots) + (base is not None)
    weights = [1.0] * count if weights is None else list(weights)
    if count < 2:
        raise ValueError(f"Averaging takes two checkpoints or more, got {count}. Give another, or a base.")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown. Valid methods: {', '.join(METHODS)}.")
    if len(weights) != count or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights={weights} must be {count} positive numbers, one for each checkpoint.")
    target = Path(output).resolve()
    check_empty(target)
    files = _common_files(roots)
    check_room(target, sum((roots[0] / file).stat().st_size for file in files))
    with tempfile.TemporaryDirectory() as scratch, written_beside(target) as staged:
        if base is not None:
            roots.append(_with_weights_of(base, roots[0], Path(scratch)))
            files = _common_files(roots)
        for file in files_of(roots[0]):
            (staged / file).parent.mkdir(parents=True, exist_ok=True)
            if file not in files and not any(file.match(pattern) for pattern in NOT_OF_THE_MODEL):
                shutil.copy(roots[0] / file, staged / file)
        for file in files:
            tensors = [load_file(root / file) for root in roots]
            _check_tensors(roots, file, tensors)
            for root, of_root in zip(roots, tensors, strict=True):
                _check_numbers(root / file, of_root)
            averaged = {name: _average([t[name] for t in tensors], weights, method) for name in tensors[0]}
            save_file(averaged, staged / file, {"format": "pt"})
    return target


def _with_weights_of(base: str | Path, like: Path, scratch: Path) -> Path:
    """A folder of the model ``like``, with the weights of the plain LLM in place of its LLM's."""
    if Path(base).suffix == ".gguf":
        unpack_gguf(Path(base), scratch / "base")
        base = scratch / "base"
    source = fetch(base, only=OF_A_BASE, pickles=True)
    check_no_code(source, False)
    place = like / read_json(like / "modules.json")[0]["path"]
    with loading(like):
        config = load_inner_config(AutoConfig.from_pretrained(place, trust_remote_code=False), trust_remote_code=False)
    with loading(base):
        llm = AutoModel.from_pretrained(source, dtype=config.dtype or "auto", trust_remote_code=False)
    depth = config.get_text_config().num_hidden_layers
    if depth < llm.config.get_text_config().num_hidden_layers:
        keep_first_layers(llm, depth)
    model = scratch / "model"
    shutil.copytree(like, model)
    for file in (model / place.relative_to(like)).glob("*.safetensors"):
        file.unlink()
    llm.save_pretrained(scratch / "llm")  # under the names that the files of the LLM have
    for file in (scratch / "llm").glob("*.safetensors"):
        shutil.move(file, model / place.relative_to(like))
    return model


def _common_files(roots: list[Path]) -> list[Path]:
    """The files of weights, which all sources must have, with the same configuration."""
    for root in roots:
        check_model(root)
        if (root / "adapter_config.json").is_file():
            raise ValueError(
                f"{root} holds an adapter alone, and the mean of two adapters is not the adapter of the mean. Merge "
                "each into its LLM first."
            )
        for name in SAME:
            first, other = (file.read_bytes() if file.is_file() else b"" for file in (roots[0] / name, root / name))
            if first != other:
                raise ValueError(f"{roots[0]} and {root} differ in {name}: they are not checkpoints of one model.")
    weight_files = [sorted(file.relative_to(root) for file in root.rglob("*.safetensors")) for root in roots]
    for root, files in zip(roots, weight_files, strict=True):
        if files != weight_files[0] or not files:
            raise ValueError(f"{root} has the weights {list(map(str, files))}, not {list(map(str, weight_files[0]))}.")
    return weight_files[0]


def _check_tensors(roots: list[Path], file: Path, tensors: list[dict[str, Tensor]]) -> None:
    expected = {name: tensor.shape for name, tensor in tensors[0].items()}
    for root, of_root in zip(roots, tensors, strict=True):
        shapes = {name: tensor.shape for name, tensor in of_root.items()}
        if differing := sorted(name for name in expected | shapes if expected.get(name) != shapes.get(name)):
            raise ValueError(f"{roots[0] / file} and {root / file} differ in the tensors {', '.join(differing)}.")


def _check_numbers(file: Path, tensors: dict[str, Tensor]) -> None:
    if bad := [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]:
        raise ValueError(
            f"{file} has NaN or infinity in {', '.join(sorted(bad)[:5])}, and so would the average. Leave it out."
        )


def _average(tensors: list[Tensor], weights: list[float], method: str) -> Tensor:
    if not tensors[0].is_floating_point():
        return tensors[0]
    mean, total = tensors[0].float(), weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += weight
        step = _slerp if method == "slerp" else torch.lerp
        mean = step(mean, tensor.float(), weight / total)
    return mean.to(tensors[0].dtype)


def _slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """The point at ``share`` of the way along the great circle; along the line, where the two hardly differ in
    direction."""
    cosine = torch.nn.functional.cosine_similarity(start.flatten().double(), end.flatten().double(), dim=0)
    angle = math.acos(max(-1.0, min(1.0, cosine.item())))
    if math.sin(angle) < 1e-6:
        return torch.lerp(start, end, share)
    return (math.sin((1 - share) * angle) * start + math.sin(share * angle) * end) / math.sin(angle)
