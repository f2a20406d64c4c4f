"""From a model in memory to a repository that loads anywhere: save, seal, check, upload."""

from st_llm_embed.hub.checking import Checked, check, fresh_python
from st_llm_embed.hub.publishing import publish, save_sealed
from st_llm_embed.hub.sealing import seal

__all__ = ["Checked", "check", "fresh_python", "publish", "save_sealed", "seal"]
