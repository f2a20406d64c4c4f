"""Adapt an LLM to embedding on plain text, as LLaRA does (arXiv 2312.15503): no labels, no pairs.

``documents.jsonl`` has a ``text`` in each line. Afterwards the LLM may be fine-tuned (``fine_tune.py``), or kept as
the causal LM that it was.
"""

from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, PretextLoss, build_model
from st_llm_embed.data import consecutive_texts, load_rows, sentences
from st_llm_embed.weights import export_causal_lm

BASE = "HuggingFaceTB/SmolLM2-135M"

model = build_model(BASE, recipe="llara", max_seq_length=256)
rows = consecutive_texts(load_rows("documents.jsonl"), sentences)  # columns text, next
arguments = LLMEmbedTrainingArguments(
    "runs/pretext", num_train_epochs=1, per_device_train_batch_size=16, learning_rate=1e-5, report_to=[]
)
LLMEmbedTrainer(model, arguments, rows, loss=PretextLoss(model)).train()
model.save_pretrained("adapted")
export_causal_lm(model, BASE, "adapted-lm")
