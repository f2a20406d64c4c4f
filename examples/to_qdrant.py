"""Put the vectors of a corpus into a Qdrant collection, shard by shard, and search it under the model's own prompt.

``vectors`` is the folder that ``st-llm-embed encode my-model corpus.jsonl --output vectors`` wrote, in float32 or
float16: a collection compares those as they are.
"""

from qdrant_client import QdrantClient
from qdrant_client.models import Distance, VectorParams
from sentence_transformers import SentenceTransformer

from st_llm_embed.encoding import read_shards

MODEL = "my-model"
VECTORS = "vectors"
DATABASE = {"path": "qdrant"}  # a folder, to try it; of a server {"url": "http://localhost:6333"}
QUESTION = "how do I send a mail?"

client = QdrantClient(**DATABASE)
client.delete_collection("documents")
first = 0
for ids, vectors in read_shards(VECTORS):
    if first == 0:
        size = vectors.shape[1]
        client.create_collection("documents", VectorParams(size=size, distance=Distance.COSINE))
    # A point's number is that of the row, as Qdrant takes no other ids than numbers and UUIDs.
    numbers = range(first, first + len(ids))
    client.upload_collection("documents", vectors, [{"id": name} for name in ids], numbers, wait=True)
    first += len(ids)
print(f"{client.count('documents').count} documents are in {DATABASE}.")

model = SentenceTransformer(MODEL, trust_remote_code=True)
query = model.encode_query(QUESTION)
print(QUESTION)
for hit in client.query_points("documents", query, limit=3).points:
    print(f"  {hit.score:.3f}  {hit.payload['id']}")
client.close()
