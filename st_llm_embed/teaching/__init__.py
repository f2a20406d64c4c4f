"""A small model in the space of a large one, so that they share an index."""

from st_llm_embed.teaching.alignment import Alignment, align
from st_llm_embed.teaching.ridge import RidgeRegression

__all__ = ["Alignment", "RidgeRegression", "align"]
