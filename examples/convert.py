"""A published NV-Embed or LLaRA checkpoint as a model for sentence-transformers. None of its code is run."""

from sentence_transformers import SentenceTransformer

from st_llm_embed.convert import convert

CHECKPOINT = "BAAI/LLARA-passage"  # or nvidia/NV-Embed-v2, whose weights are not for commercial use

folder = convert(CHECKPOINT, "converted")
model = SentenceTransformer(str(folder), trust_remote_code=True)
queries = model.encode_query(["how do I parse command line arguments?"])
documents = model.encode_document(["argparse parses command lines", "csv reads and writes rows"])
print(model.similarity(queries, documents))
