"""Hard negatives by a teacher's scores: the documents that it ranks high for an anchor, but well below the positive.

TopK-PercPos of NV-Retriever (arXiv 2407.15831), on which NV-Embed-v2 trains: of the documents that score below 95 % of
the positive's score, take the top ones. Also an absolute margin, and top-k inside a window of ranks.

A judge (``judge.py``) may be asked about what the margins leave: what it holds for relevant is dropped, or becomes a
positive.

In: ``anchor, positive``. Out: ``anchor, positive, negative_1..n``, with a judge also its ``scores``; a report of what
each rule dropped, and why rows are missing. Spellings of one text (``normal_form``) are one, and so are a document
with its title and without.

sentence-transformers' ``mine_hard_negatives``, whose rules and argument names these are, does not serve here. It holds
all texts and vectors in memory; it writes its cache only when everything is encoded, and names it by the *base* model,
which two fine-tunes share; an anchor's own text may become its negative; its report is printed. Here texts stay in
Arrow files, and vectors in shards on disk. In memory at once are one shard, the vectors of 10,240 anchors, the shard's
scores for 1,024 of them, the best ``range_max`` scores of every anchor, and a few integers for every row and text; an
approximate search also holds the vectors of a million documents while it builds their index.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value, concatenate_datasets
from sentence_transformers import SentenceTransformer

from st_llm_embed.data.columns import check_contrastive_columns, score_column
from st_llm_embed.data.corpus import read_corpus, scratch_file
from st_llm_embed.data.normal_form import normal_form
from st_llm_embed.encoding.cache import SHARD_SIZE, EmbeddingCache
from st_llm_embed.mining.grid import SharedSearch
from st_llm_embed.mining.judged_pairs import NumberedTexts
from st_llm_embed.mining.judges import AnyJudge, read_judge
from st_llm_embed.mining.margins import highest_allowed, keep_below, lowest_of
from st_llm_embed.mining.reasons import most_frequent, reasons_of
from st_llm_embed.mining.search import UseFaiss, check_faiss, cosines_of
from st_llm_embed.mining.teachers import check_teacher
from st_llm_embed.mining.verdicts import Judged, Verdicts, ask, report_of, summary

logger = logging.getLogger(__name__)
GOOD_RECALL = 0.9
BINS = np.linspace(-1, 1, 101)  # of the report's histograms


@dataclass(frozen=True)
class MiningReport:
    """What was mined from what.

    Args:
        rows: the number of rows of the data set.
        rows_dropped: the number of rows dropped, as too few negatives were left for them.
        anchors: the number of distinct anchors.
        documents: the number of distinct texts searched.
        candidates: the number of documents looked at, over all distinct anchors.
        dropped: the number of candidates that each rule dropped; one that both margins drop counts for the relative
            one.
        scores: mean, minimum, quartiles and maximum of the cosines of the positives (``positive``, of all rows) and of
            the chosen negatives (``negative``, of the rows that are left).
        histograms: the counts of the same cosines in 100 bins of equal width from -1 to 1.
        recall: the share of the exact search's candidates that an approximate one found, for 100 of the anchors; None
            of an exact search.
        judged: None without a judge; else ``pairs``, how many it was asked about; ``relevant``, how many candidates it
            holds for relevant; ``promoted``, how many rows these became; and ``scores``, as above, of the positives
            (``positive``) and of the candidates that it was asked about (``candidate``).
    """

    rows: int
    rows_dropped: int
    anchors: int
    documents: int
    candidates: int
    dropped: dict[str, int]
    scores: dict[str, dict[str, float]]
    histograms: dict[str, list[int]]
    recall: float | None
    judged: dict[str, Any] | None = None


class Mined(NamedTuple):
    """What ``mine_negatives`` found.

    Args:
        rows: the rows that are left, in their order, as ``anchor``, ``positive``, ``negative_1..n`` with the hardest
            first; after them those of the positives that a judge found, anchor by anchor, the best first. With a judge
            also ``scores``, its own of the positive and of each negative, as ``soft_label_weight`` reads them.
        report: what was mined from what, in numbers.
        dropped: the other rows, in their order, as ``anchor``, ``positive`` and ``reason``, such as "2 of 7 negatives:
            of 100 candidates, 93 too close to the positive or above it (relative_margin=0.05), 5 skipped
            (range_min=5)"; one that both margins drop counts for the relative one.
    """

    rows: Dataset
    report: MiningReport
    dropped: Dataset


def mine_negatives(
    dataset: Dataset,
    teacher: SentenceTransformer,
    corpus: Dataset | Sequence[str] | None = None,
    *,
    num_negatives: int = 7,
    relative_margin: float | None = 0.05,
    absolute_margin: float | None = None,
    range_min: int = 0,
    range_max: int = 100,
    judge: AnyJudge | None = None,
    judged: Judged = "drop",
    judge_relative_margin: float | None = None,
    judge_absolute_margin: float | None = None,
    query_prompt: str | None = None,
    corpus_prompt: str | None = None,
    tokens_per_batch: int | None = None,
    shard_size: int = SHARD_SIZE,
    use_faiss: UseFaiss = None,
    cache_folder: str | Path | None = None,
    show_progress_bar: bool | None = None,
) -> Mined:
    """Give each row of ``dataset`` the negatives that ``teacher`` finds hardest.

    An anchor's candidates are the ``range_max`` documents of the highest cosine, but for its own text and for the
    positives of every row that has this anchor. The margins drop those too close to the positive (to the lowest, where
    there are several), and the judge those that it holds for relevant. Of the others the first ``range_min`` are
    skipped; the next ``num_negatives`` are taken.

    Args:
        dataset: the data set, with columns ``anchor`` and ``positive``; others are left out.
        teacher: any ``SentenceTransformer``, which gives each text one vector.
        corpus: the texts to choose from, besides all positives: a sequence, or a data set with a column ``text``, and
            ``title`` if it has one (they are joined), which may be larger than memory. Default: the positives alone.
        num_negatives: the number of negatives of each row; a row left with fewer is dropped.
        relative_margin: the share of the positive's cosine by which a negative's must be lower: candidates above
            ``positive - relative_margin * |positive|`` are dropped. 0.05 is NV-Retriever's 95 %; None switches the
            rule off.
        absolute_margin: the cosine by which a negative's must be lower than the positive's: candidates above
            ``positive - absolute_margin`` are dropped. None switches the rule off.
        range_min: how many of the hardest candidates to skip, as positives that nobody has marked.
        range_max: how many candidates of each anchor to look at.
        judge: a second opinion on the candidates: a ``CrossEncoder``, another ``SentenceTransformer``, ``"bm25"``, a
            ``ChatJudge`` (an LLM on a server), whatever ``load_judge(name)`` gives, or a ``Judge`` of one's own.
        judged: what becomes of a candidate that the judge holds for relevant: ``drop``, it is no negative; or
            ``promote``, it becomes a further positive of the anchor, in a row of its own. Then the judge is also asked
            about the candidates that the margins drop.
        judge_relative_margin: the share of the positive's score, by the judge, by which a candidate's must be lower
            not to be held for relevant; of several positives, of their mean. Default: 0.5 of probabilities, 0.2 of
            cosines, 0.5 of BM25, unless ``judge_absolute_margin`` is given.
        judge_absolute_margin: the difference by which it must be lower. Default: 3 of logits, unless
            ``judge_relative_margin`` is given.
        query_prompt: the prompt of the anchors. Default: the teacher's own, as in ``encode_query``.
        corpus_prompt: the prompt of the documents. Default: the teacher's own, as in ``encode_document``.
        tokens_per_batch: the number of tokens encoded at once, padding included. Default: 2,048 on a CPU, 32,768
            elsewhere.
        shard_size: the number of vectors in a file, which an interruption loses at most.
        use_faiss: ``exact``, to search with FAISS on the CPU, which finds what torch does on the teacher's device; or
            ``approximate``, with an index that misses some candidates, for corpora of more than a few million texts.
            The report has the share that it finds, and below 90 % a warning is logged.
        cache_folder: the folder in which the vectors and what was found stay for later runs, and in which several runs
            at once share the work. Default: they are deleted.
        show_progress_bar: whether to show how many texts have their vectors, and how many shards are searched.
            Default: as in ``encode``, if the level of sentence-transformers' logger is INFO or DEBUG.

    Returns:
        The rows that are left, the report, and the rows that were dropped, each with the reason.

    Raises:
        ValueError: for another kind of teacher or judge, misnamed columns, empty texts, numbers out of range, another
            ``use_faiss``, vectors and scores that are not finite, scores of another range than the judge's, a margin
            that they cannot have, and if no row is left.
        OSError: for a judge on a server that does not answer.
        ImportError: if FAISS is asked for and not installed.
    """
    check_numbers(num_negatives, relative_margin, absolute_margin, range_min, range_max, shard_size)
    check_faiss(use_faiss)
    check_teacher(teacher)
    judging = read_judge(judge, judged, judge_relative_margin, judge_absolute_margin, tokens_per_batch)
    if show_progress_bar is None:
        level = logging.getLogger(SentenceTransformer.__module__).getEffectiveLevel()
        show_progress_bar = level in (logging.INFO, logging.DEBUG)
    columns = [name for name in ("anchor", "positive") if name in dataset.column_names]
    dataset = dataset.with_format(None).select_columns(columns if len(columns) == 2 else dataset.column_names)
    check_contrastive_columns(dataset, "dataset")
    anchors = dataset.select_columns(["anchor"]).rename_column("anchor", "text")
    texts = _searched_texts(dataset, corpus)

    numbers = _number_texts(texts, anchors, corpus)
    query, positive = numbers.query, numbers.positive

    with nullcontext(cache_folder) if cache_folder else tempfile.TemporaryDirectory() as folder:
        cache = EmbeddingCache(teacher, folder, tokens_per_batch, shard_size, show_progress_bar)
        queries = cache.queries(anchors, numbers.query_rows, query_prompt)
        documents = cache.documents(texts, numbers.document_rows, corpus_prompt)
        search = SharedSearch(documents, teacher.device, Path(folder), show_progress_bar)
        scores, nearest = search.nearest(queries, numbers.excluded, min(range_max, len(documents)), use_faiss)
        recall = None
        if use_faiss == "approximate":
            recall = search.recall(queries, numbers.excluded, scores, nearest)
            _say_recall(recall)
        positive_scores = cosines_of(queries, documents, query, positive)
        candidate = np.isfinite(scores)  # (queries, k), best first
        margins = {"relative_margin": relative_margin, "absolute_margin": absolute_margin}
        limits = highest_allowed(lowest_of(query, positive_scores), margins)
        allowed, dropped = keep_below(candidate, scores, limits)
        verdicts = None
        if judging is not None:
            pairs = judging.pairs(
                NumberedTexts(anchors, numbers.query_rows, queries.hashes),
                NumberedTexts(texts, numbers.document_rows, documents.hashes),
                Path(folder),
                tokens_per_batch,
                shard_size,
                show_progress_bar,
            )
            above = candidate & ~allowed & judging.promotes
            needed = range_min + num_negatives
            verdicts = ask(pairs, query, positive, nearest, allowed, above, needed, judging.margins)
            allowed, by_judge = keep_below(allowed, verdicts.scores, verdicts.limits)
            dropped |= by_judge
            margins |= judging.margins

    chosen, dropped["range_min"] = _choose(allowed, range_min, num_negatives)
    enough = chosen.sum(axis=1) > 0
    kept, left_out = np.flatnonzero(enough[query]), np.flatnonzero(~enough[query])
    of = query[left_out]
    by_rule = {rule: counts[of] for rule, counts in dropped.items()}
    settings = {**margins, "range_min": range_min}
    reasons, reason = reasons_of(candidate.sum(axis=1)[of], by_rule, settings, num_negatives)
    totals = {rule: int(counts.sum()) for rule, counts in dropped.items()}
    if len(kept) == 0:
        raise ValueError(
            f"No row has num_negatives={num_negatives} negatives. {len(queries)} anchors had {candidate.sum()} "
            f"candidates among {len(documents)} documents; dropped were, by rule: {totals}. The reasons, by rows: "
            f"{most_frequent(reasons, reason)}. Fix: a larger corpus, a larger range_max ({range_max}), fewer "
            "negatives, or less of the rule that dropped most."
        )
    found = np.zeros_like(candidate)
    if verdicts is not None and judging is not None and judging.promotes:
        found = verdicts.relevant & enough[:, None]
    of_found = np.nonzero(found)[0]
    place = (enough.cumsum() - 1)[np.append(query[kept], of_found)]  # (rows,): each one's anchor among those kept
    negatives = nearest[chosen].reshape(-1, num_negatives)[place]  # (rows, n)
    rows = _taken(dataset, kept)
    if len(of_found):
        more = _pairs(anchors, numbers.query_rows[of_found], texts, numbers.document_rows[nearest[found]])
        rows = concatenate_datasets([rows, more.cast(rows.features)])
    columns = [
        _taken(texts, numbers.document_rows[negatives[:, i]]).rename_column("text", f"negative_{i + 1}")
        for i in range(num_negatives)
    ]
    judgement = None
    if verdicts is not None:
        columns.append(_scores(verdicts, kept, found, chosen, place))
        judgement = report_of(verdicts, len(of_found))
    cosines = {"positive": positive_scores, "negative": scores[chosen].reshape(-1, num_negatives)[place]}
    report = _report(len(dataset), len(kept), len(documents), candidate, totals, cosines, recall, judgement)
    if len(left_out):
        words = pa.array(reasons, pa.string()).take(pa.array(reason))
        without_enough = _taken(dataset, left_out).add_column("reason", words)
    else:  # NOTE: datasets 5 cannot put a column beside no rows of a table that is one of several joined.
        text = Features({name: Value("string") for name in ("anchor", "positive", "reason")})
        without_enough = Dataset.from_dict({name: [] for name in text}, features=text)
    return Mined(concatenate_datasets([rows, *columns], axis=1), report, without_enough)


def check_numbers(
    num_negatives: int,
    relative_margin: float | None,
    absolute_margin: float | None,
    range_min: int,
    range_max: int,
    shard_size: int,
) -> None:
    """Check the numbers of ``mine_negatives``.

    Raises:
        ValueError: naming the number and its range.
    """
    if num_negatives < 1 or shard_size < 1:
        raise ValueError(f"num_negatives={num_negatives} and shard_size={shard_size} must be at least 1.")
    if range_min < 0 or range_max - range_min < num_negatives:
        raise ValueError(
            f"range_min={range_min} and range_max={range_max} must leave room for num_negatives={num_negatives}: "
            "0 <= range_min, and range_min + num_negatives <= range_max."
        )
    if relative_margin is not None and not 0 <= relative_margin < 1:
        raise ValueError(f"relative_margin={relative_margin} must be in [0, 1), such as 0.05, or None.")
    if absolute_margin is not None and not 0 <= absolute_margin <= 2:
        raise ValueError(f"absolute_margin={absolute_margin} must be in [0, 2], a difference of cosines, or None.")


def _searched_texts(dataset: Dataset, corpus: Dataset | Sequence[str] | None) -> Dataset:
    """One column ``text``: the corpus, then the positives of all rows. Nothing is copied from disk to memory."""
    positives = dataset.select_columns(["positive"]).rename_column("positive", "text")
    if corpus is None:
        return positives
    documents = read_corpus(corpus)
    if positives.features != documents.features:  # large_string and string
        positives = positives.cast(documents.features)
    return concatenate_datasets([documents, positives])


def _taken(texts: Dataset, rows: np.ndarray) -> Dataset:
    """These rows, as a table of their own: on disk, if they were there."""
    return texts.select(rows).flatten_indices(cache_file_name=scratch_file(texts))


class _Numbers(NamedTuple):
    """Each distinct text has a number: first the documents, from 0 on, then the anchors that are no document."""

    document_rows: np.ndarray  # (documents,): the row of the searched texts in which each document is
    query_rows: np.ndarray  # (queries,): the row of the data set in which each distinct anchor is
    query: np.ndarray  # (rows,): each row's anchor among the distinct ones
    positive: np.ndarray  # (rows,): each row's positive among the documents
    excluded: tuple[np.ndarray, np.ndarray]  # pairs of a query and a text that is no negative of it, sorted, distinct


def _number_texts(texts: Dataset, anchors: Dataset, corpus: Dataset | Sequence[str] | None) -> _Numbers:
    digests = _with_titles(np.concatenate([_digests(texts), _digests(anchors)]), corpus)
    first_row, number = distinct(digests)
    positive, anchor_text = number[len(texts) - len(anchors) : len(texts)], number[len(texts) :]  # (rows,)
    query_rows, query = distinct(anchor_text)
    # An anchor's positives and its own text are no negatives of it.
    pairs = np.unique(np.append(query, query) * len(first_row) + np.append(positive, anchor_text))
    excluded = np.divmod(pairs, len(first_row))
    return _Numbers(first_row[first_row < len(texts)], query_rows, query, positive, excluded)


def _digests(texts: Dataset) -> np.ndarray:
    """``(rows,)``: 64 bits of a hash of each text's normal form. That two of 100 million share one has a chance of
    1 in 3,700."""
    digests = (
        hashlib.blake2b(normal_form(text).encode(), digest_size=8).digest()
        for batch in texts.iter(batch_size=10_000)
        for text in batch["text"]
    )
    return np.frombuffer(b"".join(digests), np.uint64)


def _with_titles(digests: np.ndarray, corpus: Dataset | Sequence[str] | None) -> np.ndarray:
    """``digests``, of which those of a document's text alone are that of the document with its title.

    So are the queries of sets such as ArguAna, which are documents, and rows that were made without titles.
    """
    if not isinstance(corpus, Dataset) or "title" not in corpus.column_names:
        return digests
    titled = digests[: len(corpus)]
    untitled = _digests(corpus.with_format(None).select_columns(["text"]))
    order = np.argsort(untitled, kind="stable")
    place = order[np.searchsorted(untitled, digests, sorter=order).clip(max=len(order) - 1)]
    of_document = (untitled[place] == digests) & ~np.isin(digests, titled)
    return np.where(of_document, titled[place], digests)


def distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number distinct values in the order in which they first come: the first place of each number, and the number of
    each value."""
    _, first, number = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[number]


def _choose(allowed: np.ndarray, range_min: int, num_negatives: int) -> tuple[np.ndarray, np.ndarray]:
    """Which candidates become negatives: all ``num_negatives`` of an anchor, or none; and ``(queries,)``, how many are
    skipped.

    Args:
        allowed: ``(queries, k)``, which documents the rules allow, best first.
        range_min: how many of these are skipped.
        num_negatives: the number of negatives for each query.
    """
    rank = allowed.cumsum(axis=1, dtype=np.int32)  # from 1
    skipped = (allowed & (rank <= range_min)).sum(axis=1)
    chosen = allowed & (rank > range_min) & (rank <= range_min + num_negatives)
    return chosen & (chosen.sum(axis=1, keepdims=True) == num_negatives), skipped


def _pairs(anchors: Dataset, anchor_rows: np.ndarray, texts: Dataset, text_rows: np.ndarray) -> Dataset:
    """Rows of an anchor and of a document that a judge holds for relevant."""
    columns = [
        _taken(anchors, anchor_rows).rename_column("text", "anchor"),
        _taken(texts, text_rows).rename_column("text", "positive"),
    ]
    return concatenate_datasets(columns, axis=1)


def _scores(verdicts: Verdicts, kept: np.ndarray, found: np.ndarray, chosen: np.ndarray, place: np.ndarray) -> Dataset:
    """The judge's scores of each row's positive and negatives, in this order: a list in each row.

    Args:
        verdicts: the scores.
        kept: ``(rows,)``, which rows of the data set there are.
        found: ``(queries, k)``, which candidates are the positives of the rows after them.
        chosen: ``(queries, k)``, which candidates are negatives.
        place: ``(all rows,)``, each one's anchor among those that have negatives.
    """
    positives = np.append(verdicts.positive_scores[kept], verdicts.scores[found])
    negatives = verdicts.scores[chosen].reshape(place.max() + 1, -1)[place]
    return score_column(np.column_stack([positives, negatives]).astype(np.float32))  # (all rows, 1 + n)


def _say_recall(recall: float) -> None:
    logger.info("The approximate search found %.1f %% of the candidates of an exact one.", 100 * recall)
    if recall < GOOD_RECALL:
        logger.warning(
            "The approximate search found %.1f %% of the candidates of an exact one, less than %.0f %%: some anchors' "
            "hardest negatives are missed. To miss none, leave out use_faiss, or set it to 'exact'.",
            100 * recall,
            100 * GOOD_RECALL,
        )


def _report(
    rows: int,
    rows_left: int,
    documents: int,
    candidate: np.ndarray,
    dropped: dict[str, int],
    cosines: dict[str, np.ndarray],
    recall: float | None,
    judged: dict[str, Any] | None,
) -> MiningReport:
    return MiningReport(
        rows=rows,
        rows_dropped=rows - rows_left,
        anchors=len(candidate),
        documents=documents,
        candidates=int(candidate.sum()),
        dropped=dropped,
        scores={name: summary(values) for name, values in cosines.items()},
        histograms={name: np.histogram(values.clip(-1, 1), BINS)[0].tolist() for name, values in cosines.items()},
        recall=recall,
        judged=judged,
    )
