"""A model that FSDP 2 has sharded, with its whole weights in the shards' places for as long as it is saved.

sentence-transformers 6.2 saves what its modules hold, which are shards then, and leaves out the weights that
transformers gathered for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sentence_transformers import SentenceTransformer
from torch import Tensor, nn


def prepare_for_sharding(model: SentenceTransformer) -> None:
    """What accelerate's FSDP 2 must know of a SentenceTransformer."""
    # NOTE: accelerate 1.15 shards by itself what it takes for the LLM's last norm, a child of the model by this name.
    # Without it that is Normalize, whose class FSDP cannot change: the first base of a host's module is ABC.
    model.base_model_prefix = "transformers_model"
    # The first process writes the card: it would encode alone, and wait for the others' shards.
    model.model_card_data.generate_widget_examples = False


@contextmanager
def whole_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """``weights`` in the places of the parameters of their names. Nothing may be computed meanwhile."""
    shards = {name: shard for name, shard in model.named_parameters(remove_duplicate=False) if name in weights}
    try:
        for name, shard in shards.items():
            _put(model, name, nn.Parameter(weights[name], requires_grad=shard.requires_grad))
        yield
    finally:
        for name, shard in shards.items():
            _put(model, name, shard)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(module), own_name, parameter)
