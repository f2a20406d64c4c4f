"""How near the closed form brings a student to its teacher: nDCG@10 of both, and of the student's queries on the
teacher's index.

    python -m examples.benchmarks.alignment STUDENT TEACHER --texts wikiqa squad_sentences --sets cranfield

STUDENT and TEACHER are folders of sentence-transformers models, --texts and --sets folders in BEIR's layout: of the
first the corpus and the queries are fitted on, of --corpora the corpus alone; of the sets the queries of --split are
asked.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from st_llm_embed.data.beir import judgements_file, read_texts, relevant_documents
from st_llm_embed.data.text_files import plain_or_gz
from st_llm_embed.mining import load_teacher
from st_llm_embed.teaching import align
from st_llm_embed.trust import load_trusted


def ndcg(scores: torch.Tensor, documents: list[str], relevant: list[list[str]]) -> float:
    """The mean nDCG@10 over queries, of binary judgements.

    Args:
        scores: ``(queries, documents)``.
        documents: the ids of the documents.
        relevant: the ids of each query's relevant documents.
    """
    gains = 1 / np.log2(np.arange(2, 12))
    figures = []
    for found, wanted in zip(scores.topk(min(10, len(documents))).indices.tolist(), relevant, strict=True):
        hits = np.array([documents[place] in wanted for place in found])
        figures.append((gains[: len(hits)] * hits).sum() / gains[: min(10, len(wanted))].sum())
    return float(np.mean(figures))


def figures(student: SentenceTransformer, teacher: SentenceTransformer, folder: Path, split: str) -> dict[str, float]:
    """The figures of one set."""
    corpus = {line.id: line.document for line in read_texts(plain_or_gz(folder / "corpus.jsonl"))}
    texts = {line.id: line.text for line in read_texts(plain_or_gz(folder / "queries.jsonl"))}
    relevant, _ = relevant_documents(judgements_file(folder, split), 1, Counter())
    asked = {query: [name for name in own if name in corpus] for query, own in relevant.items() if query in texts}
    asked = {query: own for query, own in asked.items() if own}
    queries, documents = [texts[query] for query in asked], list(corpus)
    index = {name: model.encode_document([*corpus.values()]) for name, model in (("s", student), ("t", teacher))}
    asking = {name: model.encode_query(queries) for name, model in (("s", student), ("t", teacher))}
    pairs = {"student": ("s", "s"), "teacher": ("t", "t"), "student's queries, teacher's index": ("s", "t")}
    return {
        name: ndcg(teacher.similarity(asking[query], index[document]), documents, [*asked.values()])
        for name, (query, document) in pairs.items()
    }


def documents_of(file: Path, most: int) -> list[str]:
    """The first texts of a corpus or of queries."""
    return [line.document for line in read_texts(plain_or_gz(file)) if line.document.strip()][:most]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--corpora", type=Path, nargs="*", default=[])
    parser.add_argument("--sets", type=Path, nargs="+", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--most", type=int, default=5000, help="texts of each kind and folder (default: %(default)s)")
    arguments = parser.parse_args()
    student, teacher = load_trusted(arguments.student), load_teacher(arguments.teacher)
    sides: dict[str, list[str]] = {"queries": [], "documents": []}
    for folder in arguments.texts:
        sides["queries"] += documents_of(folder / "queries.jsonl", arguments.most)
    for folder in (*arguments.texts, *arguments.corpora):
        sides["documents"] += documents_of(folder / "corpus.jsonl", arguments.most)
    start = time.process_time()
    aligned, alignment = align(
        student, teacher, **{side: Dataset.from_dict({"text": own}) for side, own in sides.items()}
    )
    print(f"Fitted on {alignment.texts} texts in {time.process_time() - start:.0f} s of CPU time; held out:")
    print({penalty: round(cosine, 3) for penalty, cosine in alignment.cosines.items()})
    for folder in arguments.sets:
        before = figures(student, student, folder, arguments.split)["student"]
        print(
            folder.name,
            {"student before": round(before, 3)}
            | {name: round(figure, 3) for name, figure in figures(aligned, teacher, folder, arguments.split).items()},
        )


if __name__ == "__main__":
    main()
