"""Hard negatives by a teacher's scores and a judge's. ``histogram.py`` writes what was mined, and needs ``plots``."""

from st_llm_embed.mining.chat_judge import ChatJudge
from st_llm_embed.mining.judges import load_judge
from st_llm_embed.mining.negatives import Mined, MiningReport, mine_negatives
from st_llm_embed.mining.teachers import load_teacher

__all__ = ["ChatJudge", "Mined", "MiningReport", "load_judge", "load_teacher", "mine_negatives"]
