"""A published model in vLLM: vLLM's own class of the LLM, under the model's mask, and the model's pooling after it."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load
from tokenizers import Tokenizer
from torch import Tensor, nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.pooler import Pooler, PoolingParamsUpdate
from vllm.model_executor.models.adapters import as_embedding_model
from vllm.model_executor.models.interfaces_base import VllmModelForPooling
from vllm.transformers_utils.repo_utils import get_hf_file_bytes
from vllm.v1.attention.backend import AttentionType

from st_llm_embed.serving.folder import Folder
from st_llm_embed.serving.pooling import pool, project
from st_llm_embed.serving.prompt_lookup import PromptLookup
from st_llm_embed.serving.vllm_config import model_folder

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.tasks import PoolingTask
    from vllm.v1.pool.metadata import PoolingMetadata


class LLMBackbone(nn.Module, VllmModelForPooling):
    """The LLM and its pooling.

    Raises:
        ValueError: if vLLM's class of the LLM does not attend as the model does.
    """

    is_pooling_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        folder = model_folder(model_config)
        self.llm = as_embedding_model(_llm_class(model_config))(vllm_config=vllm_config, prefix=prefix)
        del self.llm.pooler
        name = f"{type(self.llm).__name__} for {', '.join(model_config.hf_config.backbone_architectures)}"
        check_attention(self.llm, name, folder.backbone, model_config.max_model_len)
        self.pooler = TextPooler(model_config, folder, vllm_config.device_config.device)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.llm.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        return self.llm(input_ids, positions, intermediate_tensors, inputs_embeds)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return {f"llm.{name}" for name in self.llm.load_weights(weights)}


def _llm_class(model_config: ModelConfig) -> type[nn.Module]:
    """vLLM's class of the LLM; transformers' code in vLLM where there is none."""
    known = model_config.registry.get_supported_archs()
    saved = model_config.hf_config.backbone_architectures
    names = [name if name in known else f"{name.removesuffix('Model')}ForCausalLM" for name in saved]
    return model_config.registry.resolve_model_cls(names, model_config)[0]


def check_attention(llm: nn.Module, name: str, backbone: dict[str, Any], max_model_len: int) -> None:
    """Check that each of vLLM's layers attends as the model's ``LLMBackbone`` does.

    Args:
        llm: vLLM's model.
        name: its class and the LLM's, for the message.
        backbone: the settings of ``LLMBackbone``.
        max_model_len: how many tokens a text has at most.

    Raises:
        ValueError: for a layer with another mask, or a window where it should be open.
    """
    layers = [module for module in llm.modules() if isinstance(module, AttentionLayerBase)]
    masks = {getattr(layer, "attn_type", type(layer).__name__) for layer in layers}
    if backbone["attention"] == "bidirectional" and masks != {AttentionType.ENCODER_ONLY}:
        raise ValueError(
            f"The model is bidirectional, and vLLM's {name} is not ({', '.join(sorted(masks))}), whatever its "
            "configuration says. Serve it by sentence-transformers or as ONNX, or build it on an LLM whose mask vLLM "
            "opens, such as Llama, Mistral, Qwen2, Qwen3 or Gemma 3."
        )
    if backbone["attention"] == "causal" and AttentionType.ENCODER_ONLY in masks:
        raise ValueError(f"The model is causal, and vLLM's {name} is not. Serve it by sentence-transformers.")
    windows = {window for layer in layers if (window := getattr(layer, "sliding_window", None)) is not None}
    if backbone["window"] == "full" and any(window < max_model_len for window in windows):
        raise ValueError(
            f"The model's windows are open, and vLLM's {name} has windows of {sorted(windows)} tokens. Serve it "
            f"with --max-model-len {min(windows)}, by sentence-transformers or as ONNX."
        )


class TextPooler(Pooler):
    """The pooling of whole texts, and what comes after it.

    Args:
        model_config: vLLM's configuration of the model.
        folder: what the model's files say of it.
        device: where the hidden states are.
    """

    def __init__(self, model_config: ModelConfig, folder: Folder, device: torch.device) -> None:
        super().__init__()
        self.folder = folder

        def read(file: str) -> bytes:
            content = get_hf_file_bytes(file, model_config.model, model_config.revision)
            if content is None:
                raise ValueError(f"The model has no {file}. Copy or upload its whole folder.")
            return content

        def weights(path: str) -> dict[str, Tensor]:
            return {name: tensor.to(device) for name, tensor in load(read(f"{path}/model.safetensors")).items()}

        self.weights = weights(folder.pooling_path) if folder.pooling == "LatentAttentionPooling" else {}
        self.dense = [(config, weights(path)) for path, config in folder.dense]
        self.lookup: PromptLookup | None = None
        if not folder.pooling_config.get("include_prompt", True):
            # What is chosen at the server's start for its endpoint with input_type is left out too.
            chosen = getattr(model_config.hf_config, "task_instructions", None) or {}
            columns = folder.backbone["instruction_mask"] == "nv-embed"
            if not (columns and folder.tokenizer_config.get("padding_side") == "left"):
                tokenizer = Tokenizer.from_buffer(read("tokenizer.json"))
                prompts = [*folder.prompts.values(), *chosen.values()]
                with torch.device("cpu"):  # where the token ids are; vLLM makes models on the accelerator
                    self.lookup = PromptLookup(tokenizer, prompts, columns)

    def get_supported_tasks(self) -> Set[PoolingTask]:
        return {"embed"}

    def get_pooling_updates(self, task: PoolingTask) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=self.lookup is not None)

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor]:
        lengths, device = pooling_metadata.get_pooling_cursor().num_scheduled_tokens_cpu.long(), hidden_states.device
        in_text = torch.ones(len(hidden_states), dtype=torch.bool)
        if self.lookup is not None:
            ids = pooling_metadata.prompt_token_ids_cpu
            assert ids is not None  # asked for by get_pooling_updates
            real = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)  # (batch, seq)
            ids = F.pad(ids, (0, max(0, real.shape[1] - ids.shape[1])))  # vLLM's trial runs give fewer
            ids = ids.long().masked_fill(~real, 0).clamp(max=len(self.lookup.lengths) - 1)  # the LLM may know more
            in_text = self.lookup(ids, real.long())[real] == 0
        config = self.folder.pooling_config
        pooled = pool(self.folder.pooling, config, self.weights, hidden_states, lengths.to(device), in_text.to(device))
        for config, weights in self.dense:
            pooled = project(config, weights, pooled)
        vectors = []
        for vector, params in zip(pooled, pooling_metadata.pooling_params, strict=True):
            vector = vector[: params.dimensions]
            vectors.append(F.normalize(vector, dim=-1) if params.use_activation else vector)
        return vectors
