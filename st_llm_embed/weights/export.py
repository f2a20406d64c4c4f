"""An adapted LLM back as the plain causal LM that it was, for tools that know nothing of embeddings.

LLaRA's pretext tasks (arXiv 2312.15503) train an ordinary LLM: what is left without pooling and prompts can be trained
further by any script, served, or adapted again. In: a model whose backbone attends causally. Out: a folder for
``AutoModelForCausalLM``, in the base's configuration, with the base's tokenizer and the tokens that were added.
"""

from __future__ import annotations

from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.base import BaseModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from st_llm_embed.files import check_empty, check_room, size_of, written_beside
from st_llm_embed.modules.first_layers import keep_first_layers
from st_llm_embed.trust import check_data, check_no_code, loading
from st_llm_embed.weights.merging import has_adapter, merge_adapter


def export_causal_lm(
    model: SentenceTransformer, base: str | Path, folder: str | Path, lm_head: nn.Linear | None = None
) -> Path:
    """Write the LLM of ``model`` as a causal LM. Adapters are merged into a copy of it first.

    Args:
        model: the model to export, built from ``base``, in causal attention.
        base: the Hub id or folder of the LLM, for its configuration, its tokenizer, and its LM head where that is not
            tied to the embeddings.
        folder: the folder to write; must not exist, or be empty.
        lm_head: the LM head that ``PretextLoss`` trained, in place of the base's. Not where that is tied.

    Returns:
        The folder.

    Raises:
        FileExistsError: if ``folder`` holds something.
        OSError: if ``folder`` cannot be written, or its disk has no room for the LLM.
        ValueError: for a bidirectional model, an LLM that ``base`` is not, or a head where it is tied.
    """
    target = Path(folder).resolve()
    check_empty(target)
    check_room(target, size_of(model))
    if (attention := attention_of(model)) != "causal":
        raise ValueError(
            f"The model attends in the mode {attention!r}: its weights are not those of a causal LM. Adapt "
            "the LLM with attention='causal'."
        )
    llm = (merge_adapter(model) if has_adapter(model) else model).transformers_model
    if Path(base).is_dir():
        check_data(Path(base), pickles=True)
        check_no_code(Path(base), False)
    with loading(base):
        # False, for by default transformers asks on standard input.
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=llm.dtype, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    depth = llm.config.get_text_config().num_hidden_layers
    if depth < whole.config.get_text_config().num_hidden_layers:
        keep_first_layers(whole, depth)
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens(
        [token for _, token in sorted(model.tokenizer.added_tokens_decoder.items()) if token.content not in vocabulary]
    )
    rows = llm.get_input_embeddings().num_embeddings
    if rows != whole.get_input_embeddings().num_embeddings:
        whole.resize_token_embeddings(rows)
    try:
        whole.base_model.load_state_dict(llm.state_dict())
        if lm_head is not None:
            _set_head(whole.get_output_embeddings(), lm_head, whole.config.get_text_config().tie_word_embeddings)
    except RuntimeError as error:
        raise ValueError(f"base={str(base)!r} is not the LLM that the model was built from: {error}") from error
    with written_beside(target) as staged:
        whole.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    return target


def _set_head(head: nn.Linear, trained: nn.Linear, tied: bool) -> None:
    if tied:
        raise ValueError("The LLM's head is its input embeddings, which are adapted: leave out lm_head.")
    rows = len(trained.weight)  # added tokens have rows of their own behind these
    for name, parameter in trained.named_parameters():
        head.get_parameter(name).data[:rows] = parameter.data


def attention_of(model: BaseModel) -> str:
    """``bidirectional`` or ``causal``: what the backbone says, or where it is stock, the LLM's configuration."""
    config = model.transformers_model.config
    stock = "causal" if getattr(config, "is_causal", True) else "bidirectional"
    return model[0].get_config_dict().get("attention") or stock
