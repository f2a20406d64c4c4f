"""Write a model's folder, look at it, then put it on the Hub. Log in before: ``hf auth login``."""

from sentence_transformers import SentenceTransformer

from st_llm_embed import publish
from st_llm_embed.hub import check, save_sealed

MODEL = "my-model"
REPOSITORY = "your-org/your-new-model"

model = SentenceTransformer(MODEL, trust_remote_code=True)
model.model_card_data.set_license("apache-2.0")
folder = save_sealed(model, "to-publish")  # loads it without this package, and compares
print(f"{folder} gives the same vectors within {check(folder).difference:.0e}. Read its README.md before you go on.")
print(publish(model, REPOSITORY, private=True))  # with a LoRA adapter: adapter="merge", or "only"
