"""Embed texts with a model, and search with it. A published model needs sentence-transformers only."""

from sentence_transformers import SentenceTransformer, util

MODEL = "my-model"  # a folder, or a Hub id
DOCUMENTS = [
    "argparse parses command lines",
    "csv reads and writes rows of comma separated values",
    "smtplib sends e-mail",
]
QUESTIONS = ["how do I send a mail?", "how do I read a table?"]

model = SentenceTransformer(MODEL, trust_remote_code=True)
documents = model.encode_document(DOCUMENTS, convert_to_tensor=True)
queries = model.encode_query(QUESTIONS, convert_to_tensor=True)
for question, hits in zip(QUESTIONS, util.semantic_search(queries, documents, top_k=2), strict=True):
    print(question)
    for hit in hits:
        print(f"  {hit['score']:.3f}  {DOCUMENTS[hit['corpus_id']]}")
