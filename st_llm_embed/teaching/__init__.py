"""A small model that learns from a large one, and in its space, so that they share an index."""

from st_llm_embed.teaching.alignment import Alignment, align
from st_llm_embed.teaching.embeddings import TeacherEmbeddings, with_arrays
from st_llm_embed.teaching.ridge import RidgeRegression
from st_llm_embed.teaching.teacher import Teacher

__all__ = ["Alignment", "RidgeRegression", "Teacher", "TeacherEmbeddings", "align", "with_arrays"]
