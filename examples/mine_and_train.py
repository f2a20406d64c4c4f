"""Mine hard negatives with a teacher, then train on each row's own ones: NV-Embed's second stage.

``pairs.csv`` has the columns ``question`` and ``answer``; ``corpus.jsonl`` a ``text`` in each line, and perhaps a
``title``.
"""

from sentence_transformers import SentenceTransformer

from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, Task, build_model
from st_llm_embed.data import load_corpus, load_rows
from st_llm_embed.mining import mine_negatives

BASE = "HuggingFaceTB/SmolLM2-135M"
TEACHER = "sentence-transformers/all-MiniLM-L6-v2"
TASK = Task("docs", "Given a question, retrieve documentation that answers it", in_batch_negatives=False)

pairs = load_rows("pairs.csv", columns={"anchor": "question", "positive": "answer"})
mined = mine_negatives(
    pairs, SentenceTransformer(TEACHER), load_corpus("corpus.jsonl"), num_negatives=2, cache_folder="vectors"
)
print(f"{len(mined.rows)} rows; candidates dropped by rule: {mined.report.dropped}")
for row in mined.dropped.select(range(min(3, len(mined.dropped)))):
    print(f"dropped: {row['anchor']!r} has {row['reason']}")

model = build_model(BASE, recipe="nv-embed", max_seq_length=256)
arguments = LLMEmbedTrainingArguments(
    "runs/mined", stage=2, num_train_epochs=1, per_device_train_batch_size=16, learning_rate=2e-5, report_to=[]
)
LLMEmbedTrainer(model, arguments, {TASK.name: mined.rows}, tasks=[TASK]).train()
model.save_pretrained("my-model")
