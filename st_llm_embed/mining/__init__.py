"""Hard negatives by a teacher's scores. ``histogram.py`` writes what was mined; it needs the extra ``plots``."""

from st_llm_embed.mining.negatives import Mined, MiningReport, mine_negatives
from st_llm_embed.mining.teachers import load_teacher

__all__ = ["Mined", "MiningReport", "load_teacher", "mine_negatives"]
