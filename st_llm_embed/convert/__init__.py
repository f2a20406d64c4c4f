"""Published checkpoints as models of this package: no remote code of theirs is run."""

from st_llm_embed.convert.llara import convert_llara
from st_llm_embed.convert.nv_embed import convert_nv_embed, load_nv_embed

__all__ = ["convert_llara", "convert_nv_embed", "load_nv_embed"]
