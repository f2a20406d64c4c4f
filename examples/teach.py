"""Teach a small LLM the vectors of a large embedding model, from plain texts: its queries search that model's index.

``corpus.jsonl`` has a ``text`` in each line, and perhaps a ``title``: texts like those that will be searched, without
any labels.
"""

from sentence_transformers import SentenceTransformer

from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, Task, build_model
from st_llm_embed.data import from_texts
from st_llm_embed.hub import save_sealed
from st_llm_embed.hub.teacher import name_teacher
from st_llm_embed.teaching import Teacher, align

BASE = "HuggingFaceTB/SmolLM2-135M"
TEACHER = "sentence-transformers/all-MiniLM-L6-v2"

texts = from_texts("corpus.jsonl")
teacher = SentenceTransformer(TEACHER)
# A projection into the teacher's space, fitted in closed form. Steps on it would soon lose what that has found.
model, alignment = align(build_model(BASE, "mean", max_seq_length=128), teacher, documents=texts)
print(f"Before the first step: mean cosine {alignment.cosine:.3f} on {alignment.held_out} texts held out.")
model[-2].requires_grad_(False)
arguments = LLMEmbedTrainingArguments(
    "runs/taught",
    num_train_epochs=1,
    per_device_train_batch_size=32,
    learning_rate=8e-4,  # of a small LLM in full: a large one takes less
    warmup_steps=0.1,
    train_sampling_strategy="group_by_length",
    contrastive_weight=0,  # more, with pairs of anchor and positive among the data sets
    report_to=[],
)
task = Task("texts", kind="documents")
LLMEmbedTrainer(model, arguments, {"texts": texts}, tasks=[task], teacher=Teacher(teacher, "vectors")).train()
save_sealed(model, "student", teacher=name_teacher(TEACHER))
student = SentenceTransformer("student")  # without this package
print(teacher.similarity(student.encode_query(["who jumped?"]), teacher.encode_document(texts[:3]["text"])))
