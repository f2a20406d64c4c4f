"""Retrieval figures of a model and of BM25 on one test, by the same code: sentence-transformers' evaluator."""

from __future__ import annotations

import bm25s
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator


def retrieval_test(
    queries: dict[str, str],
    corpus: dict[str, str],
    relevant: dict[str, set[str]],
    name: str,
    batch_size: int = 32,
) -> InformationRetrievalEvaluator:
    """One retrieval test, to run on several models or on one model at several times.

    Args:
        queries: text by query id. Asked under the model's saved ``query`` prompt.
        corpus: text by document id.
        relevant: the ids of each query's relevant documents.
        name: of the test, in the model card.
        batch_size: texts encoded at once.
    """
    return InformationRetrievalEvaluator(
        queries,
        corpus,
        relevant,
        name=name,
        mrr_at_k=[10],
        ndcg_at_k=[10],
        accuracy_at_k=[10],
        precision_recall_at_k=[10],
        map_at_k=[10],
        batch_size=batch_size,
        show_progress_bar=True,
        write_csv=False,
        query_prompt_name="query",
    )


def model_scores(test: InformationRetrievalEvaluator, model: SentenceTransformer) -> dict[str, float]:
    """nDCG@10, recall@10 and MRR@10 of a model; the model's card keeps the last ones."""
    scores = test(model)
    return {figure: scores[f"{test.name}_cosine_{figure}"] for figure in ("ndcg@10", "recall@10", "mrr@10")}


def bm25_scores(test: InformationRetrievalEvaluator) -> dict[str, float]:
    """The same figures for BM25: bm25s with its defaults and English stop words."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize(test.corpus, stopwords="en", show_progress=False), show_progress=False)
    queries = bm25s.tokenize(test.queries, stopwords="en", show_progress=False)
    found, scores = index.retrieve(queries, k=min(10, len(test.corpus)), show_progress=False)
    hits = [
        [{"corpus_id": test.corpus_ids[i], "score": float(s)} for i, s in zip(*row, strict=True)]
        for row in zip(found, scores, strict=True)
    ]
    figures = test.compute_metrics(hits)
    return {f"{figure}@10": float(figures[f"{figure}@k"][10]) for figure in ("ndcg", "recall", "mrr")}
