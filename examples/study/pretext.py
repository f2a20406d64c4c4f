"""What LLaRA's adaptation is worth before any fine-tuning: none, autoregressive alone, or EBAE + EBAR.

    python examples/study/pretext.py --data ../shared/data --output pretext-study

The same Wikipedia paragraphs in the same order for every variant, the same steps and learning rate, three seeds. Each
model is then asked for documents it has not seen, as LLaRA would be: EBAR's prompt around queries, EBAE's around
documents, the EOS token after them. A run that is there already is not repeated; the table is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from torch import Tensor
from transformers import set_seed

from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, PretextLoss, build_model
from st_llm_embed.data import consecutive_texts
from st_llm_embed.data.beir import relevant_documents
from st_llm_embed.data.sources import joined, read_json_lines
from st_llm_embed.demo import bundled_llm
from st_llm_embed.retrieval_test import bm25_scores, model_scores, retrieval_test

SEEDS = (0, 1, 2)
BATCH = 8
TESTS = ("cranfield", "scifact", "trecqa")
DISTRACTORS = 500  # documents beside the relevant ones, the same for every model


class AutoregressiveLoss(PretextLoss):
    """Next-token prediction on the text, through the same pass: what more ordinary training would do."""

    def forward(self, sentence_features: list[dict[str, Tensor]], labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"ar": super().forward(sentence_features, labels)["ar"]}


VARIANTS: dict[str, tuple[type[PretextLoss], str] | None] = {
    "none": None,
    "AR": (AutoregressiveLoss, "release"),
    "EBAE + EBAR": (PretextLoss, "mean"),
}


def held_back(folder: Path) -> InformationRetrievalEvaluator:
    """The test queries of a set in BEIR's layout; its relevant documents and the first others."""
    judged_by_query, _ = relevant_documents(folder / "qrels" / "test.tsv", 1, Counter())
    relevant = {query: set(documents) for query, documents in judged_by_query.items()}
    corpus = read_json_lines(folder / "corpus.jsonl.gz")
    documents = {row["_id"]: joined(row["title"], row["text"]) for _, row in corpus}
    judged = set.union(*relevant.values()) & set(documents)
    others = sorted(set(documents) - judged)[:DISTRACTORS]
    asked = read_json_lines(folder / "queries.jsonl.gz")
    queries = {row["_id"]: row["text"] for _, row in asked if row["_id"] in relevant}
    return retrieval_test(queries, {name: documents[name] for name in [*judged, *others]}, relevant, folder.name, 64)


def train(model: SentenceTransformer, variant: str, rows: Dataset, seed: int, arguments: argparse.Namespace) -> list:
    """Adapt the model; give the logged losses."""
    loss_class, form = VARIANTS[variant]
    args = LLMEmbedTrainingArguments(
        str(arguments.output / "scratch"),
        max_steps=arguments.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.steps // 10,
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        seed=seed,
        bf16=torch.cuda.is_available(),
    )
    trainer = LLMEmbedTrainer(model, args, rows, loss=loss_class(model, form=form))
    trainer.train()
    names = ("step", "loss", "ebae", "ebar", "ar")
    return [{n: row[n] for n in names if n in row} for row in trainer.state.log_history if "loss" in row]


def run(variant: str, seed: int, tests: list[InformationRetrievalEvaluator], arguments: argparse.Namespace) -> dict:
    """One model's figures, read from its file if it is there."""
    file = arguments.output / f"{variant.replace(' ', '')}-{seed}.json"
    if not file.is_file():
        set_seed(seed)
        model = build_model(bundled_llm(), "llara", num_layers=arguments.layers, max_seq_length=128)
        losses = []
        if VARIANTS[variant]:
            source = str(arguments.data / "wikipedia_en" / "train.jsonl.gz")
            paragraphs = load_dataset("json", data_files=source, split="train", streaming=True)
            stream = consecutive_texts(paragraphs, document_column="doc", max_characters=300)
            rows = Dataset.from_list(list(stream.take(50_000))).shuffle(seed)
            losses = train(model, variant, rows.select(range(BATCH * arguments.steps)), seed, arguments)
        results = {test.name: model_scores(test, model)["ndcg@10"] for test in tests}
        file.write_text(json.dumps({"results": results, "losses": losses}, indent=1))
    return json.loads(file.read_text())


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets, in the layout of BEIR")
    parser.add_argument("--output", type=Path, required=True, help="folder for results; runs in it are kept")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tests = [held_back(arguments.data / name) for name in TESTS]
    print(f"| nDCG@10, {arguments.layers} layers, {arguments.steps} steps | {' | '.join(TESTS)} | mean |")
    print(f"| --- |{' --- |' * (len(TESTS) + 1)}")
    bm25 = [bm25_scores(test)["ndcg@10"] for test in tests]
    print("| BM25 |", " | ".join(f"{score:.3f}" for score in [*bm25, statistics.mean(bm25)]), "|", flush=True)
    for variant in VARIANTS:
        runs = [
            run(variant, seed, tests, arguments)["results"] for seed in (SEEDS if VARIANTS[variant] else SEEDS[:1])
        ]
        columns = [[row[name] for row in runs] for name in TESTS] + [[statistics.mean(row.values()) for row in runs]]
        cells = [
            f"{statistics.mean(column):.3f}" + (f" ± {statistics.stdev(column):.3f}" if len(column) > 1 else "")
            for column in columns
        ]
        print(f"| {variant} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
