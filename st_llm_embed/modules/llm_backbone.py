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
only, and still gives and takes padded batches.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers.processors import Sequence as ProcessorSequence
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils.peft_utils import find_adapter_config_file

from .adapters import (
    demand_peft,
    find_base,
    load_adapter,
    save_lost_base,
    split_hub_arguments,
)
from .attention_mode import attending, set_attention_mode
from .first_layers import keep_first_layers
from .reference import warn_if_changed
from .text_pooling import pool_text

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
TEXT_ONLY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


class LLMBackbone(Transformer):
    """A decoder-only LLM with mask control.

    Args:
        model_name_or_path: a Hub id or a local folder of a decoder-only LLM.
        attention: ``"bidirectional"`` (every token sees every token) or ``"causal"``.
        window: what becomes of an LLM's sliding windows: ``"full"`` opens them, as NV-Embed does; ``"keep"`` keeps
            them, symmetric where the attention is bidirectional. By default open where it is bidirectional, kept where
            it is causal.
        add_eos: end every text with the tokenizer's EOS token, also when it is truncated. ``"nv-embed"``: as the
            released NV-Embed models do, in the text before it is truncated, so that long texts lose it. A tokenizer
            that ends its texts itself, as Qwen3-Embedding's does, keeps the token that it ends them with, and gets no
            second one.
        instruction_mask: which tokens count as the prompt's. ``"exact"``: those wholly inside it, by character
            offsets, and BOS before them. ``"nv-embed"``: as many columns as the prompt alone has tokens, from the
            first on, as the released NV-Embed models count (one token of the prompt may stay in the pool; none is
            kept out where padding is on the left).
        probe: prove at each construction and loading that every layer attends as asked. It costs milliseconds; False
            believes the saved config.
        num_layers: keep only the first ``num_layers`` layers and the final norm.
        **kwargs: the arguments of ``sentence_transformers.base.modules.Transformer``.

    Raises:
        ValueError: for an unknown mode, a model that is not a decoder-only LLM or cannot take the mode, a tokenizer
            without EOS or without character offsets, or ``num_layers`` outside 1..depth or not to be had of this LLM.
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
        attention: str = "bidirectional",
        window: str | None = None,
        add_eos: bool | str = True,
        instruction_mask: str = "exact",
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
        self._set_special_tokens()
        self._forget_unused_code()
        if (base := self.model.name_or_path) and Path(base).is_dir():
            self.model.name_or_path = str(Path(base).resolve())  # an adapter shall find it from anywhere

    def _load_config(
        self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]
    ) -> tuple[PretrainedConfig, bool]:
        """The LLM's configuration; an adapter's is that of its base."""
        where, others = split_hub_arguments(config_kwargs)
        if backend != "torch" or find_adapter_config_file(model_name_or_path, **where) is None:
            return super()._load_config(model_name_or_path, backend, config_kwargs)
        demand_peft()
        base, base_where = find_base(model_name_or_path, where)
        # Consent to an adapter's code is none to its base's, which was not run where transformers knows the type.
        settings, _ = PretrainedConfig.get_config_dict(base, **base_where)
        if settings.get("model_type") in CONFIG_MAPPING:
            others["trust_remote_code"] = False
        return AutoConfig.from_pretrained(base, **others, **base_where), True

    def _load_model(
        self,
        model_name_or_path: str,
        transformer_task: str,
        config: PretrainedConfig,
        backend: str,
        is_peft_model: bool,
        **model_kwargs: Any,
    ) -> PreTrainedModel:
        """Load the LLM; an adapter after its base, which gets room first where the adapter brings more embeddings."""

        def load(*arguments: Any, **named: Any) -> PreTrainedModel:
            llm = super(LLMBackbone, self)._load_model(*arguments, **named)
            if self.num_layers is not None:
                keep_first_layers(llm, self.num_layers)
            return llm

        if not is_peft_model:
            return load(model_name_or_path, transformer_task, config, backend, is_peft_model, **model_kwargs)
        where, others = split_hub_arguments(model_kwargs)
        base, base_where = find_base(model_name_or_path, where)
        # NOTE: of an adapter, sentence-transformers 6.2 drops the revision, and transformers then takes main's.
        # Told where to look for an adapter of the base's own, lest it finds this one above a base in a subfolder.
        others["adapter_kwargs"] = base_where
        if _is_of_transformers(config):
            others["trust_remote_code"] = False
        model = load(base, transformer_task, config, backend, False, **others, **base_where)
        if base.startswith(model_name_or_path):  # beside it, where the next adapter cannot find it
            model.name_or_path = ""
        load_adapter(model, model_name_or_path, where, self.num_layers)
        return model

    def _forget_unused_code(self) -> None:
        """Drop ``auto_map`` where transformers' own classes did the work: who loads what is saved from this one would
        run it."""
        if _is_of_transformers(self.model):
            configs = [self.model.config]
            for config in configs:  # which grows
                vars(config).pop("auto_map", None)
                configs += [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
        if _is_of_transformers(self.tokenizer):
            self.tokenizer.init_kwargs.pop("auto_map", None)

    def _set_special_tokens(self) -> None:
        """Pad with something, and append EOS by the tokenizer itself, so that stock modules reload it too."""
        tokenizer = self.tokenizer
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} has no character offsets, which the instruction mask needs. Save it as a "
                "fast tokenizer (tokenizer.json) first."
            )
        if tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of {self.model.config.model_type!r} has no EOS token. Pass "
                "processor_kwargs={'eos_token': '<a token of its vocabulary>'}."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if self.add_eos is True and not special_ids(tokenizer)[1]:
            _append_eos(tokenizer)

    def preprocess(
        self,
        inputs: Sequence[str],
        prompt: str | None = None,
        processing_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Tokenize texts, each with the prompt around it.

        Args:
            inputs: texts.
            prompt: put before every text; or, where it contains ``{text}``, around it, its parts tokenized by
                themselves (but for a part before the text that ends in a space): truncation cuts the text, never
                what is around it.
            processing_kwargs: as in ``Transformer.preprocess``.

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
        text_settings, common = settings.get("text", {}), settings.get("common", {})
        merged = {**text_settings, **common}
        by_task = {"query": self.query_length, "document": self.document_length}.get(kwargs.get("task"))
        max_length = merged.get("max_length") or kwargs.get("max_length") or by_task or self.max_seq_length
        if max_length is not None and max_length > LARGE_INTEGER:  # what tokenizers without a maximum have
            max_length = None
        instruction_length = len(self._token_ids(prefix)) if prefix else 0
        around = len(before) + instruction_length + len(suffix_ids) + len(after)
        if max_length is not None and around >= max_length:
            raise ValueError(
                f"The prompt {prompt!r} takes {around} tokens with BOS and EOS, which leaves no room for text "
                f"within max_seq_length={max_length}. Raise max_seq_length or shorten the prompt."
            )
        inserted = len(prefix_ids) + len(suffix_ids)
        truncated = max_length is not None and merged.get("truncation") is not False
        cut_left = bool(joined) and truncated and self.tokenizer.truncation_side == "left"
        changed: dict[str, Any] = {"return_offsets_mapping": True} if joined else {}
        if cut_left:
            changed |= {"truncation": False, "max_length": None, "verbose": False}  # it would cut the prompt
        elif inserted and truncated:
            changed["max_length"] = max_length - inserted
        if inserted or cut_left:  # the batch is as wide as it shall be only after that
            changed |= {"padding": bool(merged.get("padding", True)), "pad_to_multiple_of": None}
        settings = {
            **settings,
            "text": {**text_settings, **changed},
            "common": {key: changed.get(key, value) for key, value in common.items()},
        }
        features = super().preprocess(inputs, prompt=joined or None, processing_kwargs=settings, **kwargs)
        if joined:
            offsets = features.pop("offset_mapping")
            features["instruction_mask"] = _exact_instruction_mask(offsets, features, len(prefix))
            if cut_left:
                _cut_texts(features, max_length - inserted, self.tokenizer)
            if self.instruction_mask == "nv-embed":
                # The released code keeps nothing out of the pool where it pads on the left.
                columns = instruction_length if self.tokenizer.padding_side == "right" else 0
                features["instruction_mask"] = features["attention_mask"].clone()
                features["instruction_mask"][:, columns:] = 0
        if prefix_ids:
            self._insert_prefix(features, prefix_ids, len(before))
        if suffix_ids:
            self._insert_suffix(features, suffix_ids, len(after))
        if inserted or cut_left:
            width = features["input_ids"].shape[1]
            if max_length is not None and merged.get("padding") == "max_length":
                width = max(width, max_length)
            multiple = merged.get("pad_to_multiple_of") or 1
            _pad(features, -(-width // multiple) * multiple, self.tokenizer)
        return features

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

    def _insert_prefix(self, features: dict[str, Any], prefix_ids: list[int], before: int) -> None:
        """Put the prefix after each row's BOS; both stay out of the pool."""
        first = features["attention_mask"].argmax(dim=1, keepdim=True)  # (batch, 1): each row's first real token
        columns = torch.arange(features["input_ids"].shape[1], device=first.device)
        features["instruction_mask"] = ((columns >= first) & (columns < first + before)).long()
        _insert(features, prefix_ids, first + before, instruction=1)

    def _insert_suffix(self, features: dict[str, Any], suffix_ids: list[int], after: int) -> None:
        """Put the suffix after each row's text and before its EOS."""
        columns = torch.arange(features["input_ids"].shape[1], device=features["input_ids"].device)
        last = (columns * features["attention_mask"]).argmax(dim=1, keepdim=True)  # (batch, 1): the last real token
        insert_at = last + features["attention_mask"].amax(dim=1, keepdim=True) - after  # a row may have no token
        if self.add_eos == "nv-embed" and not after:
            insert_at -= (features["input_ids"].gather(1, last) == self.tokenizer.eos_token_id).long()
        _insert(features, suffix_ids, insert_at, instruction=0)

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
        own = ("structured_mask", "instruction_mask")  # the LLM's forward takes neither
        inputs = {key: value for key, value in features.items() if key not in own}
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
            outputs = super().forward(_without_padding(inputs) if flatten else inputs, **kwargs)
        if flatten:
            real, states = attention_mask.bool(), outputs["token_embeddings"]  # (batch, seq), (1, tokens, dim)
            padded = states.new_zeros(*real.shape, states.shape[-1])
            features["token_embeddings"] = padded.masked_scatter(real.unsqueeze(-1), states)
        else:
            given = ("attention_mask", "position_ids")  # perhaps others than the batch's own
            features.update({key: value for key, value in outputs.items() if key not in given})
        return features

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
        if self._has_adapter() and not getattr(self.model, "is_quantized", False):
            # An adapter's base would come back in the precision of its own files.
            dtype = str(self.model.get_input_embeddings().weight.dtype).removeprefix("torch.")
            config["model_kwargs"] = {"dtype": dtype}
        return config

    def _has_adapter(self) -> bool:
        return getattr(self.model, "_hf_peft_config_loaded", False)

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write it; of an LLM with an adapter only that, and the LLM besides where the adapter could not name it."""
        super().save(output_path, *args, **kwargs)
        # NOTE: some tokenizer classes (GPTNeoXTokenizer, CodeLlamaTokenizer) build themselves anew where they are
        # loaded, and lose the EOS that is in tokenizer.json. The plain class reads all of it from there.
        file = Path(output_path) / "tokenizer_config.json"
        tokenizer = {key: getattr(self.tokenizer, key) for key in ("padding_side", "truncation_side")}
        tokenizer["tokenizer_class"] = "TokenizersBackend"
        config = json.loads(file.read_text(encoding="utf-8")) | tokenizer
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if self._has_adapter():
            save_lost_base(self.model, Path(output_path))
        # NOTE: sentence-transformers checks the requirements of what it loads, and drops them from what it saves. It
        # writes this file before its first module.
        file = Path(output_path) / "config_sentence_transformers.json"
        if file.is_file():
            config = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps({**config, "requirements": REQUIREMENTS}, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> LLMBackbone:
        backbone = super().load(model_name_or_path, *args, **kwargs)
        where = {k: kwargs.get(k) for k in ("token", "cache_folder", "revision")}
        where["local_files_only"] = kwargs.get("local_files_only", False)
        if file := cls.load_file_path(model_name_or_path, "reference.json", **where):
            chosen = kwargs.get("model_kwargs") or {}
            dtype = chosen.get("dtype", chosen.get("torch_dtype"))
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


def _is_of_transformers(thing: Any) -> bool:
    return type(thing).__module__.startswith("transformers.")


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids that the tokenizer itself puts before every text (BOS), and after it (EOS)."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    return ids[: special.index(0)], ids[len(ids) - special[::-1].index(0) :]


def drop_text_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer put no special token after a text."""
    processor = tokenizer.backend_tokenizer.post_processor
    if processor is None:
        return
    state = json.loads(processor.__getstate__())
    for template in _templates(state):
        while "SpecialToken" in template["single"][-1]:
            template["single"].pop()
    processor.__setstate__(json.dumps(state).encode())
    tokenizer.backend_tokenizer.post_processor = processor


def _append_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer itself end every text with EOS, within its maximum length."""
    eos = tokenizer.eos_token
    processor = tokenizer.backend_tokenizer.post_processor
    state = {} if processor is None else json.loads(processor.__getstate__())
    # NOTE: two templates in a row lose the second one's token, so an existing template (BOS) is extended.
    if templates := _templates(state):
        templates[0]["single"].append({"SpecialToken": {"id": eos, "type_id": 0}})
        templates[0]["special_tokens"][eos] = {"id": eos, "ids": [tokenizer.eos_token_id], "tokens": [eos]}
        processor.__setstate__(json.dumps(state).encode())
    else:
        template = TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)])
        processor = ProcessorSequence([template] if processor is None else [processor, template])
    tokenizer.backend_tokenizer.post_processor = processor


def _templates(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a post-processor's state that put special tokens around texts."""
    return [part for part in state.get("processors", [state]) if part.get("type") == "TemplateProcessing"]


def _without_padding(features: dict[str, Any]) -> dict[str, Any]:
    """A batch as one row of its real tokens, as flash attention's variable-length kernels take it."""
    real = features["attention_mask"].bool()
    lengths = real.sum(dim=1)
    boundaries = nn.functional.pad(lengths.cumsum(dim=0), (1, 0)).int()  # (batch + 1,)
    longest = int(lengths.max())
    return {
        "input_ids": features["input_ids"][real].unsqueeze(0),  # (1, tokens)
        "position_ids": features["position_ids"][real].unsqueeze(0),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _insert(features: dict[str, Any], ids: list[int], insert_at: Tensor, instruction: int) -> None:
    """Insert ``ids`` into each row before column ``insert_at`` ``(batch, 1)``: every row grows by the same number."""
    batch, seq = features["input_ids"].shape
    columns = torch.arange(seq, device=insert_at.device)
    moved_to = columns + (columns >= insert_at) * len(ids)  # (batch, seq): where each column goes
    new_columns = insert_at + torch.arange(len(ids), device=insert_at.device)  # (batch, len(ids))
    new = torch.tensor(ids, device=insert_at.device).expand(batch, -1)
    fills = {
        "input_ids": new,
        "attention_mask": torch.ones_like(new),
        "instruction_mask": torch.full_like(new, instruction),
    }
    for key in fills.keys() & features.keys():
        old = features[key]
        grown = old.new_zeros(batch, seq + len(ids)).scatter(1, moved_to, old)
        features[key] = grown.scatter(1, new_columns, fills[key])


def _cut_texts(features: dict[str, Any], max_length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Truncate each row to ``max_length`` tokens by those that follow its prompt: the text loses its beginning."""
    mask, instruction = features["attention_mask"], features["instruction_mask"]
    columns = torch.arange(mask.shape[1], device=mask.device)
    start = mask.argmax(dim=1, keepdim=True) + instruction.sum(dim=1, keepdim=True)  # (batch, 1): of the text
    excess = (mask.sum(dim=1, keepdim=True) - max_length).clamp(min=0)
    kept = mask.bool() & ~((columns >= start) & (columns < start + excess))  # (batch, seq)
    width = int(kept.sum(dim=1).max())
    if tokenizer.padding_side == "left":
        order = kept.long().argsort(dim=1, stable=True)[:, -width:]
    else:
        order = (~kept).long().argsort(dim=1, stable=True)[:, :width]
    real = kept.gather(1, order)
    features["attention_mask"] = real.long()
    features["instruction_mask"] = instruction.gather(1, order) * real
    features["input_ids"] = features["input_ids"].gather(1, order).masked_fill(~real, tokenizer.pad_token_id)


def _pad(features: dict[str, Any], width: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad a batch to ``width`` columns."""
    missing = width - features["input_ids"].shape[1]
    sides = (missing, 0) if tokenizer.padding_side == "left" else (0, missing)
    for key, fill in {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "instruction_mask": 0}.items():
        if key in features:
            features[key] = nn.functional.pad(features[key], sides, value=fill)


def _exact_instruction_mask(offsets: Tensor, features: dict[str, Any], prefix_length: int) -> Tensor:
    """``(batch, seq)``: 1 from the first token (BOS too) to the last token that lies wholly inside the prompt.

    A token that straddles the border, such as ``▁are`` of ``"Query: are"``, belongs to the text.
    """
    start, end = offsets.unbind(-1)  # (batch, seq), in characters of prompt + text
    inside = (end > start) & (end <= prefix_length)
    # Up to and including the last such token: BOS has no characters of its own, and neither has EOS after it.
    up_to_last = inside.long().flip(1).cummax(dim=1).values.flip(1)
    return up_to_last * features["attention_mask"]
