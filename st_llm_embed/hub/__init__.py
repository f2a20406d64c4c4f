"""From a model in memory to a repository that loads anywhere: save, seal, check, upload."""

from st_llm_embed.hub.checking import check, load_trusted
from st_llm_embed.hub.folders import demand_empty, demand_room, demand_writable, find_damaged, size_of, written_beside
from st_llm_embed.hub.publishing import publish, save_sealed
from st_llm_embed.hub.sealing import seal

__all__ = [
    "check",
    "demand_empty",
    "demand_room",
    "demand_writable",
    "find_damaged",
    "load_trusted",
    "publish",
    "save_sealed",
    "seal",
    "size_of",
    "written_beside",
]
