"""From a model in memory to a repository that loads anywhere: save, seal, check, upload."""

from st_llm_embed.hub.checking import check, fresh_python
from st_llm_embed.hub.folders import demand_empty, demand_room, demand_writable, find_damaged, size_of, written_beside
from st_llm_embed.hub.publishing import publish, save_sealed
from st_llm_embed.hub.sealing import seal
from st_llm_embed.hub.trust import load_trusted

__all__ = [
    "check",
    "demand_empty",
    "demand_room",
    "demand_writable",
    "find_damaged",
    "fresh_python",
    "load_trusted",
    "publish",
    "save_sealed",
    "seal",
    "size_of",
    "written_beside",
]
