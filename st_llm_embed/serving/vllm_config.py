"""What vLLM decides of a pooling model, checked and completed by the model's own files before weights are loaded."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from st_llm_embed.serving.folder import Folder, read_folder
from st_llm_embed.serving.pooling import check_dense, check_pooling
from st_llm_embed.serving.vllm_plugin import NAME

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def model_folder(model_config: ModelConfig) -> Folder:
    """What the model's files say of it."""
    return read_folder(partial(get_hf_file_to_dict, model=model_config.model, revision=model_config.revision))


class LLMBackboneSettings(VerifyAndUpdateConfig):
    """What vLLM asks before it makes the model."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Refuse what would give other vectors than the model's, and choose its tokenization.

        Raises:
            ValueError: for modules that are not served, or a mask, pooling or tokenizer that is chosen by hand.
        """
        folder = model_folder(model_config)
        check_pooling(folder.pooling, folder.pooling_config)
        for _, dense in folder.dense:
            check_dense(dense)
        if isinstance(model_config.hf_overrides, dict) and "is_causal" in model_config.hf_overrides:
            raise ValueError("The model's own settings say how it attends. Leave is_causal out of --hf-overrides.")
        config, text_config = model_config.hf_config, model_config.hf_text_config
        if folder.backbone["attention"] == "causal":
            config.is_causal = True
        elif getattr(config, "is_causal", True):
            config.is_causal = False  # the mask is opened by code, and the configuration says nothing of it
        elif folder.backbone["window"] == "keep" and getattr(text_config, "sliding_window", None):
            # Under is_causal=False transformers lets tokens at a distance of the window's size in; vLLM's end before.
            text_config.sliding_window += 1
        pooler_config = model_config.pooler_config
        if pooler_config is None:
            raise ValueError("This model gives embeddings. Start it with --runner pooling.")
        chosen = [key for key, source in model_config._pooler_config_sources.items() if source == "user"]
        if set(chosen) - {"use_activation"} or pooler_config.enable_chunked_processing:
            raise ValueError(
                "The model's own modules say how it pools. Leave --pooler-config out, or give it use_activation alone."
            )
        # The sum over all tokens, whatever the pooling: with MEAN, vLLM hands on no part of a text.
        pooler_config.seq_pooling_type = "MEAN"
        if pooler_config.use_activation is None:
            pooler_config.use_activation = folder.normalize
        if model_config.tokenizer_mode not in ("auto", "hf", NAME) or model_config.skip_tokenizer_init:
            raise ValueError(
                f"tokenizer_mode={model_config.tokenizer_mode!r} with "
                f"skip_tokenizer_init={model_config.skip_tokenizer_init} would make other tokens than the model's. "
                "Leave both at their defaults."
            )
        model_config.tokenizer_mode = NAME

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse to pool parts of texts.

        Raises:
            ValueError: for chunked prefill or a prefix cache.
        """
        for setting, on in (
            ("--enable-chunked-prefill", vllm_config.scheduler_config.enable_chunked_prefill),
            ("--enable-prefix-caching", vllm_config.cache_config.enable_prefix_caching),
        ):
            if on:
                raise ValueError(f"With {setting} the pooling would get a part of a text's tokens. Leave it out.")
