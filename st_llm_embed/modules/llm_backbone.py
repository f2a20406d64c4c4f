"""A decoder-only LLM as the first module of a SentenceTransformer: text in, token embeddings out.

Four things on top of sentence-transformers' ``Transformer``, whose loading, saving, prompts and truncation it keeps:

- ``attention``: causal, or bidirectional as in NV-Embed (arXiv 2405.17428), windows open or kept, proven by a probe;
- an EOS token after every text, kept by truncation, or the one that the tokenizer ends its texts with itself;
- the exact instruction mask: which tokens belong to the prompt, decided by character offsets, row by row; the host's
  ``Pooling(include_prompt=False)`` goes by it too;
- prompts with a part after the text, such as LLaRA's ``"{text} The next sentence:"`` (arXiv 2312.15503).

``preprocess`` gives ``input_ids`` and ``attention_mask`` ``(batch, seq)`` and, where there is a prompt,
``instruction_mask`` ``(batch, seq)`` with 1 on the tokens to keep out of the pool. ``forward`` adds
``token_embeddings`` ``(batch, seq, dim)``, after the LLM's final norm, and takes ``structured_mask`` ``(batch, seq,
seq)`` with ``position_ids`` ``(batch, seq)`` in place of its own mask. Under flash attention it computes real tokens
only, and on a CPU, where no gradients are asked for, a batch in groups of rows of like length (``row_groups.py``); it
still gives and takes padded batches.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from transformers.tokenization_utils_base import LARGE_INTEGER

from .adapters import AdapterTransformer, is_of_transformers
from .attention_mask import attending
from .attention_mode import set_attention_mode
from .prompt_tokens import cut_texts, exact_instruction_mask, insert_prefix, insert_suffix, pad_to_width
from .reference import warn_if_changed
from .root_config import wrap_config
from .row_groups import cut_to_length, rows_by_length
from .special_tokens import set_special_tokens, special_ids
from .text_pooling import pool_text
from .unpadding import with_padding, without_padding

logger = logging.getLogger(__name__)
REQUIREMENTS = {
    "sentence-transformers": {"specifier": ">=6.2", "reason": "the module interface that the saved files use"},
    "transformers": {
        "specifier": ">=5.20",
        "reason": "what older versions make of the saved files was not tried",
    },
}
TEXT = "{text}"
INSTRUCTION_MASKS = ("exact", "nv-embed")
# Of a group of rows on a CPU: of 256 to 4,096, the fewest were the fastest, with one thread and with two. It does not
# depend on their number, so that a vector's last bits do not.
GROUP_TOKENS = 256
TEXT_ONLY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


class LLMBackbone(AdapterTransformer):
    """A decoder-only LLM with mask control.

    Args:
        model_name_or_path: a Hub id or a local folder of a decoder-only LLM.
        attention: ``"bidirectional"`` (every token sees every token) or ``"causal"``.
        window: what becomes of an LLM's sliding windows: ``"full"`` opens them, as NV-Embed does; ``"keep"`` keeps
            them, symmetric where the attention is bidirectional. By default open where it is bidirectional, kept where
            it is causal.
        add_eos: whether to end every text with the tokenizer's EOS token, also when it is truncated.
            ``"nv-embed"``: as the released NV-Embed models do, in the text before it is truncated, so that long texts
            lose it. A tokenizer that ends its texts itself, as Qwen3-Embedding's does, keeps the token that it ends
            them with, and gets no second one.
        instruction_mask: which tokens count as the prompt's. ``"exact"``: those wholly inside it, by character
            offsets, and BOS before them. ``"nv-embed"``: as many columns as the prompt alone has tokens, from the
            first on, as the released NV-Embed models count (one token of the prompt may stay in the pool; none is
            kept out where padding is on the left).
        probe: whether to prove at each construction and loading that every layer attends as asked. It costs
            milliseconds; False believes the saved config.
        num_layers: how many of the LLM's first layers to keep, with its final norm. Default: all.
        **kwargs: the arguments of ``sentence_transformers.base.modules.Transformer``.

    Raises:
        ValueError: for an unknown mode, a model that is not a decoder-only LLM or cannot take the mode, a tokenizer
            without EOS or without character offsets, ``num_layers`` outside 1..depth or not to be had of this LLM, a
            backend other than torch, or ``query_expansion``.
    """

    config_keys = [
        *Transformer.config_keys,
        "attention",
        "window",
        "add_eos",
        "instruction_mask",
        "probe",
        "num_layers",
    ]

    def __init__(
        self,
        model_name_or_path: str,
        *,
        attention: Literal["bidirectional", "causal"] = "bidirectional",
        window: Literal["full", "keep"] | None = None,
        add_eos: bool | Literal["nv-embed"] = True,
        instruction_mask: Literal["exact", "nv-embed"] = "exact",
        probe: bool = True,
        num_layers: int | None = None,
        **kwargs: Any,
    ) -> None:
        # Plain text even where the tokenizer has a chat template: Transformer would render every text as a chat.
        kwargs.setdefault("modality_config", TEXT_ONLY)
        kwargs.setdefault("module_output_name", "token_embeddings")
        if instruction_mask not in INSTRUCTION_MASKS:
            raise ValueError(
                f"instruction_mask={instruction_mask!r} is unknown. Valid values: {', '.join(INSTRUCTION_MASKS)}."
            )
        if add_eos not in (True, False, "nv-embed"):
            raise ValueError(f"add_eos={add_eos!r} is unknown. Valid values: True, False, 'nv-embed'.")
        if (backend := kwargs.get("backend", "torch")) != "torch":
            raise ValueError(
                f"An LLMBackbone runs on backend='torch', not on {backend!r}. For ONNX Runtime and OpenVINO, export "
                "the whole model as one ONNX graph (export_onnx, where the model was made) and run that."
            )
        if kwargs.get("query_expansion") is not None:
            raise ValueError(
                f"query_expansion={kwargs['query_expansion']!r}: an LLMBackbone adds no tokens to queries, as an LLM "
                "has none that it learned to fill in. Leave it out."
            )
        for loader in ("model_kwargs", "processor_kwargs", "config_kwargs"):
            # By default transformers asks on standard input.
            kwargs[loader] = {"trust_remote_code": False, **(kwargs.get(loader) or {})}
        self.num_layers = num_layers  # before the LLM is loaded, which is cut before it gets an adapter
        super().__init__(model_name_or_path, **kwargs)
        self.attention = attention
        self.window = window or ("keep" if attention == "causal" else "full")
        self.add_eos = add_eos
        self.instruction_mask = instruction_mask
        self.probe = probe
        self._reference: tuple[str, bool] | None = None  # the file, and whether the caller chose another dtype
        self._takes_position_ids = "position_ids" in inspect.signature(self.model.forward).parameters
        set_attention_mode(self.model, attention, self.window, probe)
        set_special_tokens(self.tokenizer, self.model.config.model_type, end=add_eos is True)
        self.tokenizer.chat_template = None  # engines that find one put a prompt's text into a chat
        self._forget_unused_code()
        if (base := self.model.name_or_path) and Path(base).is_dir():
            self.model.name_or_path = str(Path(base).resolve())  # an adapter shall find it from anywhere

    def _forget_unused_code(self) -> None:
        """Drop ``auto_map`` where transformers' own classes did the work: who loads what is saved from this one would
        run it."""
        if is_of_transformers(self.model):
            configs = [self.model.config]
            for config in configs:  # which grows
                vars(config).pop("auto_map", None)
                configs += [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
        if is_of_transformers(self.tokenizer):
            self.tokenizer.init_kwargs.pop("auto_map", None)

    def preprocess(
        self,
        inputs: Sequence[str],
        prompt: str | None = None,
        processing_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Tokenize texts, each with the prompt around it.

        Args:
            inputs: the texts.
            prompt: the text to put before every text; or, where it contains ``{text}``, around it, its parts
                tokenized by themselves (but for a part before the text that ends in a space): truncation cuts the
                text, never what is around it.
            processing_kwargs: the tokenizer's arguments, as in ``Transformer.preprocess``.

        Raises:
            ValueError: if the prompt leaves no room for text within ``max_seq_length`` or has more than one
                ``{text}``, or if ``inputs`` are not texts.
        """
        try:
            return self._preprocess(inputs, prompt, processing_kwargs, **kwargs)
        except (TypeError, AttributeError) as error:
            # NOTE: SentenceTransformer takes these two for a module without prompts, and embeds another text.
            raise ValueError(f"Texts under the prompt {prompt!r} cannot be tokenized: {error}") from error

    def _preprocess(
        self, inputs: Sequence[str], prompt: str | None, processing_kwargs: dict[str, Any] | None, **kwargs: Any
    ) -> dict[str, Any]:
        prefix, template, suffix = (prompt or "").partition(TEXT)
        if TEXT in suffix:
            raise ValueError(f"The prompt {prompt!r} has {TEXT!r} more than once. Say once where the text goes.")
        before, after = special_ids(self.tokenizer)
        if self.add_eos == "nv-embed" and not after:
            inputs = [text + self.tokenizer.eos_token for text in inputs]
        elif not (prefix or suffix or before or after):
            # A text without a single token would have no embedding: it becomes EOS alone.
            inputs = [text if text.strip() else self.tokenizer.eos_token for text in inputs]
        if not (prefix or suffix):
            return super().preprocess(inputs, processing_kwargs=processing_kwargs, **kwargs)
        # A template's parts are tokens of their own, as in LLaRA, but for a space that the first word takes along.
        prefix_ids = self.tokenize_part(prefix) if template and prefix and not prefix[-1].isspace() else []
        suffix_ids = self.tokenize_part(suffix) if suffix else []
        joined = "" if prefix_ids else prefix
        settings = self._merge_processing_kwargs(processing_kwargs)
        merged = {**settings.get("text", {}), **settings.get("common", {})}
        instruction_length = len(self._token_ids(prefix)) if prefix else 0
        around = len(before) + instruction_length + len(suffix_ids) + len(after)
        max_length = self._max_length(merged, prompt, around, **kwargs)
        inserted = len(prefix_ids) + len(suffix_ids)
        room = None  # tokens of the longest text before the parts are inserted
        if max_length is not None and merged.get("truncation") is not False:
            room = max_length - inserted
        cut_to = room if joined and self.tokenizer.truncation_side == "left" else None
        changed: dict[str, Any] = {"return_offsets_mapping": True} if joined else {}
        if cut_to is not None:
            changed |= {"truncation": False, "max_length": None, "verbose": False}  # it would cut the prompt
        elif inserted and room is not None:
            changed["max_length"] = room
        if inserted or cut_to is not None:  # the batch is as wide as it shall be only after that
            changed |= {"padding": bool(merged.get("padding", True)), "pad_to_multiple_of": None}
        settings = {
            **settings,
            "text": {**settings.get("text", {}), **changed},
            "common": {key: changed.get(key, value) for key, value in settings.get("common", {}).items()},
        }
        features = super().preprocess(inputs, prompt=joined or None, processing_kwargs=settings, **kwargs)
        if joined:
            offsets = features.pop("offset_mapping")
            features["instruction_mask"] = exact_instruction_mask(offsets, features, len(prefix))
            if cut_to is not None:
                cut_texts(features, cut_to, self.tokenizer)
            if self.instruction_mask == "nv-embed":
                # The released code keeps nothing out of the pool where it pads on the left.
                columns = instruction_length if self.tokenizer.padding_side == "right" else 0
                features["instruction_mask"] = features["attention_mask"].clone()
                features["instruction_mask"][:, columns:] = 0
        if inserted and not features["input_ids"].shape[1]:  # no text of the batch has a token
            features.update({key: features[key].long() for key in ("input_ids", "attention_mask")})
            pad_to_width(features, 1, self.tokenizer)
        if prefix_ids:
            insert_prefix(features, prefix_ids, len(before))
        if suffix_ids:
            in_text = self.add_eos == "nv-embed" and not after
            insert_suffix(features, suffix_ids, len(after), self.tokenizer.eos_token_id if in_text else None)
        if inserted or cut_to is not None:
            self._pad_as_asked(features, merged, max_length)
        return features

    def _pad_as_asked(self, features: dict[str, Any], settings: dict[str, Any], max_length: int | None) -> None:
        width = features["input_ids"].shape[1]
        if max_length is not None and settings.get("padding") == "max_length":
            width = max(width, max_length)
        multiple = settings.get("pad_to_multiple_of") or 1
        pad_to_width(features, -(-width // multiple) * multiple, self.tokenizer)

    def _max_length(self, settings: dict[str, Any], prompt: str | None, around: int, **kwargs: Any) -> int | None:
        """Tokens of the longest text, prompt included.

        Args:
            settings: the tokenizer's arguments.
            prompt: the prompt, for the message.
            around: how many tokens stand around every text.
            **kwargs: the further arguments of ``preprocess``.
        """
        by_task = {"query": self.query_length, "document": self.document_length}.get(kwargs.get("task", ""))
        max_length = settings.get("max_length") or kwargs.get("max_length") or by_task or self.max_seq_length
        if max_length is None or max_length > LARGE_INTEGER:  # what tokenizers without a maximum have
            return None
        if around >= max_length:
            raise ValueError(
                f"The prompt {prompt!r} takes {around} tokens with BOS and EOS, which leaves no room for text "
                f"within max_seq_length={max_length}. Raise max_seq_length or shorten the prompt."
            )
        return max_length

    def _get_prompt_length(self, prompt: str, **kwargs: Any) -> int:
        """The host's count: as many tokens as the prompt alone has."""
        return len(special_ids(self.tokenizer)[0]) + len(self._token_ids(prompt))

    def _should_flatten_inputs(self, *args: Any, **kwargs: Any) -> bool:
        """No: ``forward`` drops the padding itself, so that masks and pooling see one form of batch."""
        return False

    def tokenize_part(self, part: str) -> list[int]:
        """Token ids of a part of a prompt by itself, without BOS and EOS.

        Raises:
            ValueError: if there are none.
        """
        ids = self._token_ids(part)
        if not ids:
            raise ValueError(f"The prompt part {part!r} has no tokens. Give it some text.")
        return ids

    def _token_ids(self, part: str) -> list[int]:
        return self.tokenizer(part, add_special_tokens=False)["input_ids"]

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Run the LLM.

        Args:
            features: what ``preprocess`` gives; optionally ``structured_mask`` ``(batch, seq, seq)``, True where the
                query may attend to the key, and ``position_ids`` ``(batch, seq)``.

        Returns:
            The same dict with ``token_embeddings`` ``(batch, seq, dim)``.

        Raises:
            ValueError: for a structured mask of another shape or type, one with a query that may attend to nothing or
                one under flash attention, and for positions that do not fit or that the LLM does not take.
        """
        masks = ("structured_mask", "instruction_mask")  # the LLM's forward takes neither
        inputs = {key: value for key, value in features.items() if key not in masks}
        attention_mask = features["attention_mask"]
        structured_mask, position_ids = features.get("structured_mask"), features.get("position_ids")
        if structured_mask is not None and structured_mask.shape != (*attention_mask.shape, attention_mask.shape[1]):
            raise ValueError(
                f"structured_mask {tuple(structured_mask.shape)} does not fit the batch: it must be (batch, seq, seq) "
                f"with (batch, seq) = {tuple(attention_mask.shape)}."
            )
        if position_ids is not None:
            self._check_position_ids(position_ids, attention_mask)
        elif self._takes_position_ids and (self.can_flatten_inputs or self.tokenizer.padding_side == "left"):
            # Learned positions (gpt2) would count the padding.
            position_ids = inputs["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        if structured_mask is not None:
            # It says all there is to say, padding too. Not in features: pooling reads what is there, and the
            # gradient-cached losses embed the same dict twice.
            inputs["attention_mask"] = torch.ones_like(attention_mask)
        flatten = self.can_flatten_inputs and structured_mask is None and self._takes_position_ids
        with attending(self.model, self.attention, structured_mask, position_ids):
            if not (flatten or kwargs) and structured_mask is None and self._may_group(attention_mask):
                features["token_embeddings"] = self._forward_in_groups(inputs)
                return features
            outputs = super().forward(without_padding(inputs) if flatten else inputs, **kwargs)
        if flatten:
            features["token_embeddings"] = with_padding(outputs["token_embeddings"], attention_mask)
        else:
            changed = ("attention_mask", "position_ids")  # perhaps others than the batch's own
            features.update({key: value for key, value in outputs.items() if key not in changed})
        return features

    def _may_group(self, attention_mask: Tensor) -> bool:
        """Is the batch large, on a CPU, and asked for its token embeddings alone?

        Not in training, where a gradient cache draws the same dropout a second time; nor where passes are traced,
        which would fix one batch's groups for all; nor beside other processes, which run a sharded LLM equally often.
        """
        return (
            not (torch.compiler.is_compiling() or torch.jit.is_tracing())
            and not (torch.is_grad_enabled() or self.training)
            and not (torch.distributed.is_available() and torch.distributed.is_initialized())
            and not getattr(self.model.config, "output_hidden_states", False)
            and attention_mask.device.type == "cpu"
            and attention_mask.numel() > GROUP_TOKENS
        )

    def _forward_in_groups(self, inputs: dict[str, Any]) -> Tensor:
        """``(batch, seq, dim)`` token embeddings, zero at the padding that no group computes."""
        mask = inputs["attention_mask"]
        groups = rows_by_length(mask, GROUP_TOKENS)
        padded: Tensor | None = None
        for rows in groups:
            group, columns = cut_to_length(inputs, rows)
            states = super().forward(group)["token_embeddings"]
            if padded is None:
                padded = states.new_zeros(*mask.shape, states.shape[-1])
            padded[rows, columns] = states
        assert padded is not None  # a batch that may be grouped has rows
        return padded

    def _check_position_ids(self, position_ids: Tensor, attention_mask: Tensor) -> None:
        if not self._takes_position_ids:
            raise ValueError(f"{self.config.model_type!r} counts positions by itself and takes no position_ids.")
        if position_ids.shape != attention_mask.shape:
            raise ValueError(
                f"position_ids {tuple(position_ids.shape)} do not fit the batch: they must be "
                f"{tuple(attention_mask.shape)}."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> LLMBackbone:
        # NOTE: .half() would round what the LLM computes from its config (rotary frequencies), which is not saved,
        # and which loading in half precision leaves exact.
        computed = [
            (part, name, getattr(part, name))
            for part in self.model.modules()
            for name in part._non_persistent_buffers_set
        ]
        super()._apply(fn, *args, **kwargs)
        for part, name, exact in computed:
            if exact is not None and exact.dtype != getattr(part, name).dtype:
                setattr(part, name, exact.to(getattr(part, name).device))
        return self

    def get_config_dict(self) -> dict[str, Any]:
        config = super().get_config_dict()
        if self.max_seq_length is not None and self.max_seq_length <= LARGE_INTEGER:
            config["max_seq_length"] = self.max_seq_length  # engines look for it here
        return config

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        super().save(output_path, *args, **kwargs)
        wrap_config(Path(output_path))
        # NOTE: some tokenizer classes (GPTNeoXTokenizer, CodeLlamaTokenizer) build themselves anew where they are
        # loaded, and lose the EOS that is in tokenizer.json. The plain class reads all of it from there.
        file = Path(output_path) / "tokenizer_config.json"
        tokenizer = {key: getattr(self.tokenizer, key) for key in ("padding_side", "truncation_side")}
        tokenizer["tokenizer_class"] = "TokenizersBackend"
        config = json.loads(file.read_text(encoding="utf-8")) | tokenizer
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        # NOTE: sentence-transformers checks the requirements of what it loads, and drops them from what it saves. It
        # writes this file before its first module.
        file = Path(output_path) / "config_sentence_transformers.json"
        if file.is_file():
            config = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps({**config, "requirements": REQUIREMENTS}, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> LLMBackbone:
        backbone = super().load(model_name_or_path, *args, **kwargs)
        hub_arguments = {k: kwargs.get(k) for k in ("token", "cache_folder", "revision")}
        hub_arguments["local_files_only"] = kwargs.get("local_files_only", False)
        if file := cls.load_file_path(model_name_or_path, "reference.json", **hub_arguments):
            model_kwargs = kwargs.get("model_kwargs") or {}
            dtype = model_kwargs.get("dtype", model_kwargs.get("torch_dtype"))
            backbone._reference = file, dtype not in (None, "auto")
        return backbone

    def on_model_ready(self, model: SentenceTransformer, **kwargs: Any) -> None:
        """Let the host's pooling see each row's own prompt, and warn if the model, now that it is whole, does not give
        what it gave when it was published."""
        for module in model.modules():
            if isinstance(module, Pooling) and pool_text not in module._forward_hooks.values():
                module.register_forward_hook(pool_text)
        reference, self._reference = self._reference, None
        if reference is None:
            return
        file, dtype_chosen = reference
        try:
            warn_if_changed(model, json.loads(Path(file).read_text(encoding="utf-8")), dtype_chosen)
        except Exception as error:  # whatever it is, a check must not cost the model
            logger.warning(f"The model's embeddings could not be compared with its reference.json: {error!r}")

    def __repr__(self) -> str:
        return super().__repr__().replace("Transformer", type(self).__name__, 1)
