"""Train a late-interaction model, a vector for each token, on your own pairs; index documents in Qdrant and search.

The CSV file is that of ``fine_tune.py``; the documents are the column ``text`` of ``corpus.jsonl``. With ``recipe=
"sparse"`` the same training gives SPLADE's weights of the vocabulary: see the training guide.
"""

from qdrant_client import QdrantClient
from qdrant_client.models import Distance, MultiVectorComparator, MultiVectorConfig, VectorParams
from sentence_transformers import MultiVectorEncoder

from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, Task, build_model
from st_llm_embed.data import load_rows
from st_llm_embed.hub import save_sealed

BASE = "HuggingFaceTB/SmolLM2-135M"
PAIRS, CORPUS = "pairs.csv", "corpus.jsonl"
TASK = Task("docs", "Given a question, retrieve documentation that answers it")
FOLDER = "late-model"
DATABASE = {"path": "qdrant-late"}  # a folder, to try it; of a server {"url": "http://localhost:6333"}
QUESTION = "how do I send a mail?"

model = build_model(BASE, recipe="multi-vector", token_dim=64, max_seq_length=256)
arguments = LLMEmbedTrainingArguments(
    "runs/late", num_train_epochs=1, per_device_train_batch_size=32, learning_rate=1e-4, report_to=[]
)
LLMEmbedTrainer(model, arguments, {TASK.name: load_rows(PAIRS)}, tasks=[TASK]).train()
save_sealed(model, FOLDER)

model = MultiVectorEncoder(FOLDER)  # anywhere: it needs neither this package nor trust_remote_code
documents = load_rows(CORPUS)["text"]
vectors = model.encode_document(documents, convert_to_numpy=True)  # each (tokens, 64)
sizes = [of_document.nbytes for of_document in vectors]
print(f"{len(documents)} documents, {sum(sizes) / len(sizes):,.0f} bytes each.")

client = QdrantClient(**DATABASE)
client.delete_collection("documents")
compare = MultiVectorConfig(comparator=MultiVectorComparator.MAX_SIM)
client.create_collection("documents", VectorParams(size=64, distance=Distance.DOT, multivector_config=compare))
payload = [{"text": text} for text in documents]
client.upload_collection("documents", [of_document.tolist() for of_document in vectors], payload, wait=True)

query = model.encode_query(QUESTION)
print(QUESTION)
for hit in client.query_points("documents", query.tolist(), limit=3).points:
    print(f"  {hit.score / len(query):.3f}  {hit.payload['text']}")  # MaxSim's sum by tokens: as model.similarity
client.close()
