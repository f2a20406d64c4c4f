"""Put the vectors of a corpus into a LanceDB table, shard by shard, and search it under the model's own prompt.

``vectors`` is the folder that ``st-llm-embed encode my-model corpus.jsonl --output vectors`` wrote, in float32 or
float16: a table compares those as they are.
"""

import lancedb
import pyarrow as pa
from sentence_transformers import SentenceTransformer

from st_llm_embed.encoding import read_shards

MODEL = "my-model"
VECTORS = "vectors"
DATABASE = "lancedb"  # a folder, or an address such as s3://bucket/lancedb
QUESTION = "how do I send a mail?"

database = lancedb.connect(DATABASE)
for number, (ids, vectors) in enumerate(read_shards(VECTORS)):
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    rows = pa.table({"id": ids, "vector": column})
    if number == 0:
        table = database.create_table("documents", rows, mode="overwrite")
    else:
        table.add(rows)
print(f"{table.count_rows()} documents are in {DATABASE}.")
# From some hundred thousand rows on, search an index: table.create_index(metric="cosine").

model = SentenceTransformer(MODEL, trust_remote_code=True)
query = model.encode_query(QUESTION)
print(QUESTION)
for hit in table.search(query).distance_type("cosine").limit(3).to_list():
    print(f"  {1 - hit['_distance']:.3f}  {hit['id']}")
