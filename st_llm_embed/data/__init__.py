"""Raw data to the columns that the losses read."""

from .columns import check_contrastive_columns, check_pretext_columns
from .consecutive import consecutive_texts
from .docstrings import StandardLibrary, load_standard_library
from .splitting import paragraphs, sentences, windows

__all__ = [
    "StandardLibrary",
    "check_contrastive_columns",
    "check_pretext_columns",
    "consecutive_texts",
    "load_standard_library",
    "paragraphs",
    "sentences",
    "windows",
]
