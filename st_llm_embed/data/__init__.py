"""Raw data to the columns that the losses read."""

from .columns import check_contrastive_columns, check_pretext_columns
from .docstrings import StandardLibrary, load_standard_library
from .paragraphs import consecutive_paragraphs

__all__ = [
    "StandardLibrary",
    "check_contrastive_columns",
    "check_pretext_columns",
    "consecutive_paragraphs",
    "load_standard_library",
]
