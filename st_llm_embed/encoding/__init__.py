"""Texts to vectors on disk: in shards, by any number of processes on any number of machines, nothing twice."""

from st_llm_embed.encoding.corpus import CorpusEncoding, EncodingReport
from st_llm_embed.encoding.encoder import ModelEncoder, TextEncoder
from st_llm_embed.encoding.reading import read_shards
from st_llm_embed.encoding.server import ServerEncoder

__all__ = ["CorpusEncoding", "EncodingReport", "ModelEncoder", "ServerEncoder", "TextEncoder", "read_shards"]
