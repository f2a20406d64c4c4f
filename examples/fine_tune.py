"""Fine-tune an LLM as an embedding model on your own pairs, and keep the best checkpoint by a held-back part of them.

The CSV file has the columns ``anchor`` and ``positive``, and may have ``negative_1``, ``negative_2``, ...
"""

from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, Task, build_model
from st_llm_embed.data import load_rows

BASE = "HuggingFaceTB/SmolLM2-135M"
PAIRS = "pairs.csv"
TASK = Task("docs", "Given a question, retrieve documentation that answers it")

model = build_model(BASE, recipe="nv-embed", max_seq_length=256)  # lora=True for a large LLM
rows = load_rows(PAIRS).train_test_split(test_size=0.1, seed=0)
arguments = LLMEmbedTrainingArguments(
    "runs/fine-tune",
    stage=1,
    num_train_epochs=1,
    per_device_train_batch_size=32,
    learning_rate=2e-5,
    warmup_steps=0.1,
    eval_strategy="steps",
    eval_steps=100,
    save_steps=100,
    load_best_model_at_end=True,
    metric_for_best_model=f"eval_{TASK.name}_loss",
    report_to=[],
)
trainer = LLMEmbedTrainer(
    model, arguments, {TASK.name: rows["train"]}, eval_dataset={TASK.name: rows["test"]}, tasks=[TASK]
)
trainer.train()  # resume_from_checkpoint=True goes on from the last checkpoint of a run that was stopped
model.save_pretrained("my-model")
