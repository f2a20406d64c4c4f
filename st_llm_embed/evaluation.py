"""Retrieval figures of a model and of BM25, by the same code: sentence-transformers' InformationRetrievalEvaluator."""

from __future__ import annotations

import bm25s
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

Texts = dict[str, str]
Relevant = dict[str, set[str]]


def evaluate_retrieval(
    model: SentenceTransformer, queries: Texts, corpus: Texts, relevant: Relevant, batch_size: int = 32
) -> dict[str, float]:
    """nDCG@10, recall@10 and MRR@10 of ``model``, its saved ``query`` prompt before the queries.

    Args:
        queries: text by query id.
        corpus: text by document id.
        relevant: the ids of the relevant documents by query id.
    """
    evaluator = _evaluator(queries, corpus, relevant, batch_size, query_prompt_name="query")
    scores = evaluator(model)
    return {figure: scores[f"cosine_{figure}"] for figure in ("ndcg@10", "recall@10", "mrr@10")}


def evaluate_bm25(queries: Texts, corpus: Texts, relevant: Relevant) -> dict[str, float]:
    """The same figures for BM25 (bm25s with its defaults and English stop words)."""
    ids = list(corpus)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(corpus.values()), stopwords="en", show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(list(queries.values()), stopwords="en", show_progress=False)
    found, scores = index.retrieve(tokens, k=min(10, len(ids)), show_progress=False)
    hits = [
        [{"corpus_id": ids[i], "score": float(s)} for i, s in zip(*row, strict=True)]
        for row in zip(found, scores, strict=True)
    ]
    figures = _evaluator(queries, corpus, relevant, 1).compute_metrics(hits)
    return {
        "ndcg@10": float(figures["ndcg@k"][10]),
        "recall@10": float(figures["recall@k"][10]),
        "mrr@10": float(figures["mrr@k"][10]),
    }


def _evaluator(
    queries: Texts, corpus: Texts, relevant: Relevant, batch_size: int, **kwargs: str
) -> InformationRetrievalEvaluator:
    return InformationRetrievalEvaluator(
        queries,
        corpus,
        relevant,
        mrr_at_k=[10],
        ndcg_at_k=[10],
        accuracy_at_k=[10],
        precision_recall_at_k=[10],
        map_at_k=[10],
        batch_size=batch_size,
        show_progress_bar=True,
        write_csv=False,
        **kwargs,
    )
