"""Texts to token ids in vLLM, as ``encode`` makes them (``text_encoder.py``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer

from st_llm_embed.serving.text_encoder import TextEncoder
from st_llm_embed.serving.vllm_config import model_folder

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.inputs import TextPrompt, TokensPrompt
    from vllm.renderers.params import TokenizeParams


class LLMBackboneRenderer(HfRenderer):
    """vLLM's renderer for Hugging Face tokenizers, but for how a text with its prompt is tokenized and cut."""

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        folder = model_folder(config.model_config)
        self.encoder = TextEncoder(
            self.get_tokenizer(), folder.prompts, folder.default_prompt_name, folder.backbone["add_eos"]
        )
        self.cuts_left = folder.tokenizer_config.get("truncation_side") == "left"

    def _tokenize_prompt(self, prompt: TextPrompt, params: TokenizeParams) -> TokensPrompt:
        if not params.add_special_tokens:
            raise VLLMValidationError(
                "add_special_tokens=False would leave out tokens that the model was trained with. Send token ids.",
                parameter="add_special_tokens",
            )
        cutting = params.truncate_prompt_tokens is not None
        if cutting and (self.cuts_left or params.truncation_side is not None):
            raise VLLMValidationError(
                "Texts are cut on the right, between their prompt and what follows them. "
                + ("This model cuts them on the left: send shorter ones." if self.cuts_left else "Name no side."),
                parameter="truncation_side",
            )
        try:
            ids = self.encoder(prompt["prompt"], params.get_encode_kwargs()["max_length"])
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="input") from error
        return self._build_tokens_prompt(ids, prompt)
