"""Raw data to the columns that the losses read.

Each ``from_*`` gives ``anchor, positive, negative_1..n``, with the same choices, cleaning and counts (``rows.py``):
``from_beir`` and ``from_ms_marco`` read files, the others tables or JSON lines. ``consecutive_texts`` gives
``text, next``, for the pretext tasks; ``from_texts`` single texts, for a teacher to speak of.
"""

from .beir import from_beir
from .beir_splits import write_beir_splits
from .classes import from_class_examples, from_class_labels
from .columns import check_contrastive_columns, check_pretext_columns
from .consecutive import consecutive_texts
from .corpus import load_corpus
from .judged_queries import from_judged_queries
from .ms_marco import from_ms_marco, from_ms_marco_triples
from .nli import from_nli
from .pairs import from_columns, from_parallel_text, from_sts
from .rows import Judged, contrastive_dataset
from .single_texts import from_texts
from .sources import load_rows, rename_columns
from .splitting import paragraphs, sentences, windows

__all__ = [
    "Judged",
    "check_contrastive_columns",
    "check_pretext_columns",
    "consecutive_texts",
    "contrastive_dataset",
    "from_beir",
    "from_class_examples",
    "from_class_labels",
    "from_columns",
    "from_judged_queries",
    "from_ms_marco",
    "from_ms_marco_triples",
    "from_nli",
    "from_parallel_text",
    "from_sts",
    "from_texts",
    "load_corpus",
    "load_rows",
    "paragraphs",
    "rename_columns",
    "sentences",
    "windows",
    "write_beir_splits",
]
