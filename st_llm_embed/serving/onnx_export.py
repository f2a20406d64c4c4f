"""A model as one ONNX graph: token ids in, the finished sentence embedding out.

In: ``input_ids`` and ``attention_mask``, int64 ``(batch, seq)``, of any sizes, padded on either side. Out:
``sentence_embedding``, float32 ``(batch, dim)``: the LLM in its attention mode, its pooling without the prompt where
that leaves it out, whatever follows, and ``Normalize``. Which tokens are the prompt's is told within the graph, by the
saved prompts' tokens (``prompt_lookup.py``), so that who calls it passes prompt + text and nothing else.

The folder beside the graph has what an engine needs to make those ids: a tokenizer that ends texts as ``encode`` does
and cuts them to the model's longest, the prompts, and the names by which Text Embeddings Inference finds them. It is
compared with the model before it is kept.
"""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers.tokenization_utils_base import LARGE_INTEGER

from st_llm_embed.files import check_empty, check_room, read_json, size_of, write_json, written_beside
from st_llm_embed.modules.reference import take_reference
from st_llm_embed.serving.prompt_lookup import TEXT, PromptLookup
from st_llm_embed.weights.merging import has_adapter
from st_llm_embed.weights.saved import is_quantized

# How far a vector may be from the model's. float32: rounding of sums, as elsewhere here. float16: four times its last
# bit, largest difference of a component of vectors of length 1; 7e-4 was the most that was seen of six layers. int8:
# the cosine, of which 0.995 was the lowest that was seen.
TOLERANCES: dict[str, dict[str, float]] = {
    "float32": {"largest_difference": 1e-5},
    "float16": {"largest_difference": 4 * torch.finfo(torch.float16).eps},
    "int8": {"lowest_cosine": 0.99},
}
OPSETS = range(18, 24)  # what torch's exporter writes from graphs of its own, up to the newest that it knows
OPSET = 20
GRAPH, SETTINGS, REFERENCE = Path("onnx", "model.onnx"), Path("onnx", "export.json"), "reference.json"
WEIGHTS = "model.onnx_data"  # the name that TEI downloads (1.9.3, backends/src/lib.rs, 798)
LARGEST_FILE = 1_900_000_000  # bytes of weights within the graph's own file: protobuf ends at 2 GiB
BACKBONE, LATENT = "LLMBackbone", "LatentAttentionPooling"  # by name: a published model brings copies of the classes
# TEI starts only where it finds these keys (1.9.3, router/src/lib.rs, 446 to 506), and does not pool what the graph
# has pooled (backends/ort/src/lib.rs, 442 to 455).
POOLED = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}


def export_onnx(
    model: SentenceTransformer,
    folder: str | Path,
    *,
    precision: str = "float32",
    opset: int = OPSET,
    reference: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model as one ONNX graph, with all that an encoder needs beside it, and compare it with the model.

    Args:
        model: the model, of an LLMBackbone or sentence-transformers' own Transformer. It stays as it is; a copy of it
            must fit in memory.
        folder: the folder to write; must not exist, or be empty.
        precision: ``"float32"``; ``"float16"``, for runtimes that have it, at half the size; or ``"int8"``, the
            weights of matrix products and the token embeddings in eight bits, at a quarter of it.
        opset: the version of ONNX's operators, 18 to 23.
        reference: the content of the model's ``reference.json``. Default: what the model gives now.

    Returns:
        The folder.

    Raises:
        ImportError: if onnx, onnxscript or onnxruntime is not installed.
        FileExistsError: if ``folder`` holds something.
        OSError: if ``folder`` cannot be written, or its disk has no room.
        ValueError: for an unknown precision or opset, a model under an adapter, a quantized one, settings that a graph
            cannot keep, prompts that cannot be told by token ids, or an architecture that cannot be traced.
        RuntimeError: if the graph gives other vectors than the model. Nothing is left of it then.
    """
    target = Path(folder).resolve()
    check_installed()
    check_empty(target)
    check_settings(precision, opset)
    _check_model(model)
    check_room(target, size_of(model))
    exact = copy.deepcopy(model).to("cpu", torch.float32).eval()
    lookup = _prepare_lookup(exact)
    from st_llm_embed.serving.onnx_checking import compare_with_model, compare_with_reference  # need onnxruntime

    with written_beside(target) as staged:
        (staged / GRAPH).parent.mkdir(parents=True)
        (staged / "1_Pooling").mkdir()
        write_json(staged / REFERENCE, dict(reference or take_reference(exact)))
        _write_tokenizer(exact, staged)
        _write_settings(exact, staged, precision, opset)
        shutil.copy(Path(__file__).with_name("encode_onnx.py"), staged)
        with tempfile.TemporaryDirectory(dir=staged) as scratch:
            traced = Path(scratch, "traced.onnx")
            _trace(EmbeddingGraph(_halved(exact) if precision == "float16" else exact, lookup), traced, opset)
            if precision == "int8":
                from st_llm_embed.serving.onnx_quantization import quantize

                after_pooling = tuple(f"others.{n}." for n in range(1, len(exact) - 1))  # as EmbeddingGraph names them
                with _quiet():
                    quantize(traced, exact[0].model.get_input_embeddings().weight.shape, after_pooling)
            _save(traced, staged / GRAPH)
        compare_with_model(staged, exact)
        compare_with_reference(staged)
    return target


def is_onnx_folder(root: Path) -> bool:
    """Did ``export_onnx`` write it?"""
    return (root / GRAPH).is_file() and (root / SETTINGS).is_file()


def check_installed() -> None:
    """Check that what writes and runs graphs is installed.

    Raises:
        ImportError: naming what is not.
    """
    if missing := [name for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise ImportError(f"ONNX needs {', '.join(missing)}. Fix: pip install 'st-llm-embed[onnx]'.")


class LatentStates(nn.Module):
    """What a latent attention layer reads from its latents, in the form that costs less."""

    def __init__(self, pooling: Any) -> None:
        super().__init__()
        self.folded = pooling._is_folding_cheaper(1 << 30)
        keys, values = pooling._fold_latents() if self.folded else pooling._project_latents()
        self.register_buffer("keys", keys.detach())
        self.register_buffer("values", values.detach())


class EmbeddingGraph(nn.Module):
    """A model in one pass from ids to embedding, in operations that do not depend on what the ids are.

    Args:
        model: the model, in evaluation mode and in the precision to export.
        lookup: which tokens are the prompt's; None where no pooling asks.
    """

    def __init__(self, model: SentenceTransformer, lookup: PromptLookup | None) -> None:
        super().__init__()
        self.backbone, *others = model
        self.others = nn.ModuleList(others)
        self.lookup = lookup
        with torch.no_grad():  # what depends on the weights alone is not computed in the graph
            latents = {str(n): LatentStates(part) for n, part in enumerate(others) if type(part).__name__ == LATENT}
        self.latents = nn.ModuleDict(latents)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if getattr(self.backbone, "_takes_position_ids", False):  # for padding on either side
            features["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        features = {**features, **self.backbone(features)}
        # What an LLM makes of padding need not be numbers.
        real = attention_mask.unsqueeze(-1).bool()
        features["token_embeddings"] = torch.where(real, features["token_embeddings"], 0.0)
        if self.lookup is not None:
            features["instruction_mask"] = self.lookup(input_ids, attention_mask)
        for number, module in enumerate(self.others):
            if str(number) in self.latents:
                pooled = _pool_by_latent_attention(module, self.latents[str(number)], features)
                features["sentence_embedding"] = pooled
            elif isinstance(module, Pooling):
                features["sentence_embedding"] = _pool(module, features)
            else:
                features = module(features)
        return features["sentence_embedding"].float()


def _text_mask(include_prompt: bool, features: dict[str, Any]) -> Tensor:
    """``(batch, seq)``: the tokens to pool, all of them where a row has no token but its prompt's."""
    mask = features["attention_mask"]
    if include_prompt or "instruction_mask" not in features:
        return mask
    text = mask * (1 - features["instruction_mask"])
    return torch.where(text.any(dim=1, keepdim=True), text, mask)


def _pool(pooling: Pooling, features: dict[str, Any]) -> Tensor:
    """The host's pooling of each row's own text."""
    pooling = copy.copy(pooling)
    text = _text_mask(pooling.include_prompt, features)
    # It weighs by positions in the whole row, prompt included, so it must be told of both masks.
    vars(pooling)["_exclude_prompt_from_mask"] = lambda mask, length: text
    pooled = pooling._forward_padded(features["token_embeddings"], features["attention_mask"], {}, prompt_length=1)
    return torch.cat(pooled, dim=-1)


def _pool_by_latent_attention(pooling: Any, latents: Any, features: dict[str, Any]) -> Tensor:
    """The layer on all tokens, padding too, and the mean over those of the text: what its ``forward`` gives."""
    tokens = features["token_embeddings"]
    flat = tokens.flatten(0, 1).to(pooling.latents.dtype)
    attended, inner = pooling._steps_per_token(flat, latents.keys, latents.values, latents.folded)
    weights = _text_mask(pooling.include_prompt, features).to(torch.promote_types(tokens.dtype, torch.float32))
    weights = (weights / weights.sum(dim=1, keepdim=True).clamp(min=1)).unsqueeze(1)  # (batch, 1, seq)

    def mean(states: Tensor) -> Tensor:
        return (weights @ states.to(weights.dtype).unflatten(0, tokens.shape[:2])).squeeze(1)

    pooled = mean(attended)
    if inner is not None:
        pooled = pooled + pooling.mlp_out(mean(inner).to(pooling.mlp_out.weight.dtype)).to(weights.dtype)
    return F.normalize(pooled, dim=-1) if pooling.normalize else pooled


def check_settings(precision: str, opset: int) -> None:
    """Raise ValueError for a precision or an opset that cannot be written."""
    if precision not in TOLERANCES:
        raise ValueError(f"precision={precision!r} is unknown. Valid values: {', '.join(TOLERANCES)}.")
    if opset not in OPSETS:
        raise ValueError(f"opset={opset} cannot be written. Valid values: {OPSETS[0]} to {OPSETS[-1]}.")


def _check_model(model: SentenceTransformer) -> None:
    backbone = model[0]
    if not isinstance(backbone, Transformer):
        raise ValueError(f"The model begins with {type(backbone).__name__}. It must be LLMBackbone or Transformer.")
    if has_adapter(model):
        raise ValueError(
            "The model is under an adapter. Merge it first: merge_adapter(model), or st-llm-embed merge MODEL OUT."
        )
    if is_quantized(model):
        raise ValueError(
            "The LLM is quantized, and its kernels are not ONNX's. Load the plain LLM, and ask for precision='int8'."
        )
    if backbone.tokenizer.truncation_side != "right":
        raise ValueError("The tokenizer truncates on the left. Engines that run ONNX cut texts on the right.")
    asked = {
        "truncate_dim": (model.truncate_dim, "cut the graph's vectors instead"),
        "query_length": (backbone.query_length, "one longest text, max_seq_length, is kept"),
        "document_length": (backbone.document_length, "one longest text, max_seq_length, is kept"),
    }
    for name, (value, instead) in asked.items():
        if value is not None:
            raise ValueError(f"The graph cannot keep {name}={value}. Set it to None: {instead}.")
    if type(backbone).__name__ != BACKBONE:
        if any(TEXT in prompt for prompt in model.prompts.values()):
            raise ValueError(f"Prompts with {TEXT!r} need an LLMBackbone, and the model has a Transformer.")
        if any(isinstance(module, Pooling) and not module.include_prompt for module in model):
            raise ValueError(
                "Behind sentence-transformers' own Transformer, Pooling(include_prompt=False) leaves out as many "
                "tokens as the prompt alone has, which need not be the prompt's. Build the model with an LLMBackbone."
            )


def _prepare_lookup(model: SentenceTransformer) -> PromptLookup | None:
    """Which tokens are the prompt's, where a module after the LLM may ask."""
    backbone, *others = model
    if type(backbone).__name__ != BACKBONE or all(_takes_all(module) for module in others):
        return None
    columns = backbone.instruction_mask == "nv-embed"
    if columns and backbone.tokenizer.padding_side == "left":  # then the released code leaves nothing out
        return None
    return PromptLookup(backbone.tokenizer.backend_tokenizer, model.prompts.values(), columns)


def _takes_all(module: nn.Module) -> bool:
    own = type(module).__name__ in ("PromptTokenPooling", LATENT)
    stock = type(module).__module__.startswith("sentence_transformers.")
    return (own or stock) and getattr(module, "include_prompt", True)


def _halved(model: SentenceTransformer) -> SentenceTransformer:
    """The model in float16, but for what it computes from its configuration, such as rotary frequencies."""
    computed = [
        (part, name, getattr(part, name)) for part in model.modules() for name in part._non_persistent_buffers_set
    ]
    halved = model.half()
    for part, name, exact in computed:
        setattr(part, name, exact)
    return halved


def _trace(graph: EmbeddingGraph, file: Path, opset: int) -> None:
    ids = torch.arange(16).reshape(2, 8)  # two of each: what is one is taken for always one
    mask = torch.ones_like(ids)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    model_type = graph.backbone.config.model_type
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph.eval(),
                (ids, mask),
                dynamo=True,
                input_names=["input_ids", "attention_mask"],
                output_names=["sentence_embedding"],
                dynamic_shapes=(axes, axes),
                opset_version=opset,
                verbose=False,
            )
            assert program is not None  # of dynamo=True
            program.save(file, external_data=True)
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        kinds = ", ".join(type(part).__name__ for part in (graph.backbone, *graph.others))
        raise ValueError(
            f"{model_type!r} with {kinds} cannot be traced into an ONNX graph by the exporter of torch "
            f"{torch.__version__}: {reason[0] if reason else type(error).__name__}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on what is not used here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _save(source: Path, target: Path) -> None:
    """Write the graph in one file, or its weights in a file beside it where one file cannot hold them."""
    import onnx_ir

    graph = onnx_ir.load(source)
    weights = [weight.const_value for weight in graph.graph.initializers.values()]
    if sum(weight.nbytes for weight in weights if weight is not None) > LARGEST_FILE:
        onnx_ir.save(graph, target, external_data=WEIGHTS)
    else:
        onnx_ir.save(onnx_ir.external_data.load_to_model(graph), target)


def _longest(model: SentenceTransformer) -> int | None:
    longest = model.max_seq_length
    return None if longest is None or longest > LARGE_INTEGER else int(longest)


def _write_tokenizer(model: SentenceTransformer, folder: Path) -> None:
    tokenizer = model.tokenizer
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # servers would put it around every text
    # NOTE: see LLMBackbone.save: some classes build themselves anew and lose the EOS that is in tokenizer.json.
    sides = {key: getattr(tokenizer, key) for key in ("padding_side", "truncation_side")}
    config = read_json(folder / "tokenizer_config.json") | sides | {"tokenizer_class": "TokenizersBackend"}
    write_json(folder / "tokenizer_config.json", config)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.no_padding()
    plain.no_truncation()
    if (longest := _longest(model)) is not None:
        plain.enable_truncation(longest)
    plain.save(str(folder / "tokenizer.json"))


def _write_settings(model: SentenceTransformer, folder: Path, precision: str, opset: int) -> None:
    backbone, tokenizer = model[0], model.tokenizer
    config = backbone.model.config
    text_config, longest = config.get_text_config(), _longest(model)
    prompts = {name: prompt or "" for name, prompt in model.prompts.items()}
    # An engine that knows no template would put the whole of it before the text (TEI 1.9.3, core/src/tokenization.rs,
    # 311 to 319): it shall find no prompt of that name.
    before = {name: prompt for name, prompt in prompts.items() if TEXT not in prompt}
    default = model.default_prompt_name
    positions = getattr(text_config, "max_position_embeddings", None) or longest or tokenizer.model_max_length
    write_json(
        folder / "config.json",
        {  # what TEI reads (1.9.3, router/src/lib.rs, 469 to 490, and backends/ort/src/lib.rs, 17 to 35)
            "architectures": ["OnnxEmbeddingModel"],
            "model_type": config.model_type,
            "hidden_size": text_config.hidden_size,
            "num_hidden_layers": text_config.num_hidden_layers,
            "max_position_embeddings": positions,
            "vocab_size": text_config.vocab_size,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": longest or positions})
    write_json(folder / "1_Pooling" / "config.json", POOLED)
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": before,
            "default_prompt_name": default if default in before else None,
            "similarity_fn_name": model.similarity_fn_name,
        },
    )
    write_json(
        folder / SETTINGS,
        {
            "precision": precision,
            "tolerance": TOLERANCES[precision],
            "opset": opset,
            "prompts": prompts,
            "default_prompt_name": default,
            "max_seq_length": longest,
            "eos_in_text": getattr(backbone, "add_eos", False) == "nv-embed" and not _ends_texts(tokenizer),
            "eos_token": tokenizer.eos_token,
            "padding_side": tokenizer.padding_side,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )


def _ends_texts(tokenizer: Any) -> bool:
    return bool(tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"][-1])
