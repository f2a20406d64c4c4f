"""Which judge a name means: ``bm25``, a model by what its files are, an OpenAI-compatible server by its address; and
how an object that Python gives is asked.
"""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

from sentence_transformers import CrossEncoder, SentenceTransformer

from st_llm_embed.encoding.cache import EmbeddingCache
from st_llm_embed.mining.bm25_judge import BM25Judge
from st_llm_embed.mining.chat_judge import ChatJudge
from st_llm_embed.mining.compared_pairs import ComparedPairs
from st_llm_embed.mining.cross_encoder_judge import CrossEncoderJudge, load_cross_encoder
from st_llm_embed.mining.judge import BM25_SCORES, COSINES, LOGITS, Judge, Scale, try_judge
from st_llm_embed.mining.judged_pairs import JudgedPairs, NumberedTexts, Pairs
from st_llm_embed.mining.teachers import find_model
from st_llm_embed.mining.verdicts import Judged
from st_llm_embed.trust import load_trusted

BM25 = "bm25"
AnyJudge: TypeAlias = CrossEncoder | SentenceTransformer | Judge | Literal["bm25"]
MODELS = ("CrossEncoder", "SentenceTransformer")
SPELLINGS = (
    "the folder or Hub id of a cross-encoder or of an embedding model, 'bm25', or an OpenAI-compatible server as "
    "http://localhost:8000/v1#model"
)


def is_model(name: str) -> bool:
    """Whether a judge's name is that of a model, by its folder or Hub id."""
    return name != BM25 and not name.startswith(("http://", "https://"))


def find_judge(name: str, trust_remote_code: bool = False) -> tuple[Path | None, str]:
    """The folder of a judge that is a model, which is not loaded yet, and its class; None and ``name`` of another.

    Raises:
        ValueError: if it is no judge, or runs code that is not known.
        OSError: if it is neither here nor on the Hub.
    """
    if not is_model(name):
        return None, name
    root, kind = find_model(name, "judge", trust_remote_code)
    if kind not in MODELS:
        raise ValueError(
            f"The judge {name!r} is a {kind}. A judge is {SPELLINGS}. An LLM is asked for its yes or no through a "
            "server, such as vllm serve."
        )
    return root, kind


def load_judge(name: str, trust_remote_code: bool = False, instruction: str | None = None) -> AnyJudge:
    """A judge by its name, as ``mine_negatives`` takes it.

    Args:
        name: the folder or Hub id of a cross-encoder or of an embedding model; ``bm25``; or the address of an
            OpenAI-compatible server and the name of its model, ``http://localhost:8000/v1#model``, or of the only one
            that it has.
        trust_remote_code: whether to run code of the model that this package does not ship.
        instruction: the task whose queries it judges, in a sentence for an LLM.

    Raises:
        ValueError: if it is no judge, or runs code that is not known; and for a server of several models.
        OSError: for a model or a server that is not there.
    """
    root, kind = find_judge(name, trust_remote_code)
    if root is None:
        url, _, model = name.partition("#")
        return BM25 if name == BM25 else ChatJudge(url, model or None, instruction)
    return load_cross_encoder(root, trust_remote_code) if kind == MODELS[0] else load_trusted(root, trust_remote_code)


class Judging(NamedTuple):
    """A judge that was looked at, and by what margins its scores are read.

    Args:
        judge: the judge.
        margins: by rule, of which one at least is no None.
        promotes: whether what it holds for relevant becomes a positive.
    """

    judge: SentenceTransformer | Judge | Literal["bm25"]
    margins: dict[str, float | None]
    promotes: bool

    def pairs(
        self,
        queries: NumberedTexts,
        documents: NumberedTexts,
        folder: Path,
        tokens_per_batch: int | None,
        shard_size: int,
        show_progress_bar: bool,
    ) -> Pairs:
        """Its scores of these texts, kept in ``folder``; the other arguments are those of ``EmbeddingCache``."""
        if isinstance(self.judge, SentenceTransformer):
            cache = EmbeddingCache(self.judge, folder, tokens_per_batch, shard_size, show_progress_bar)
            return ComparedPairs(cache, queries, documents)
        judge = BM25Judge(queries.all(), documents.all()) if isinstance(self.judge, str) else self.judge
        return JudgedPairs(judge, queries, documents, folder, show_progress_bar)


def read_judge(
    judge: AnyJudge | None,
    judged: Judged,
    relative_margin: float | None,
    absolute_margin: float | None,
    tokens_per_batch: int | None,
) -> Judging | None:
    """Look at a judge, ask it about two pairs, and find its margins. None of none.

    Raises:
        ValueError: for what is no judge, one whose scores are not what they should be, and a margin that its scores
            cannot have.
    """
    check_judged(judge is not None, judged, relative_margin, absolute_margin)
    if judge is None:
        return None
    asked: SentenceTransformer | Judge | Literal["bm25"]
    if isinstance(judge, CrossEncoder):
        asked = CrossEncoderJudge(judge, tokens_per_batch)
    elif isinstance(judge, SentenceTransformer | Judge) or judge == BM25:
        asked = judge
    else:
        what = repr(judge) if isinstance(judge, str) else f"a {type(judge).__name__}"
        raise ValueError(
            f"The judge is {what}. Expected: a CrossEncoder, a SentenceTransformer, 'bm25', a ChatJudge, or what "
            "load_judge(name) gives."
        )
    if isinstance(asked, SentenceTransformer):
        scale = COSINES
    else:
        scale = BM25_SCORES if isinstance(asked, str) else asked.scale
    margins = _margins(scale, relative_margin, absolute_margin)
    if not isinstance(asked, SentenceTransformer | str):
        try_judge(asked)
    return Judging(asked, margins, judged == "promote")


def check_judged(
    is_judged: bool, judged: Judged, relative_margin: float | None, absolute_margin: float | None
) -> None:
    """Check how a judge is to be read, before it is there.

    Raises:
        ValueError: for what is unknown, out of its range, or without a judge.
    """
    if judged not in get_args(Judged):
        raise ValueError(f"judged={judged!r} must be one of {', '.join(get_args(Judged))}.")
    given = {
        "judged": judged if judged != "drop" else None,
        "judge_relative_margin": relative_margin,
        "judge_absolute_margin": absolute_margin,
    }
    for name, value in given.items():
        if value is not None and not is_judged:
            raise ValueError(
                f"{name}={value!r} has no effect without a judge. Name one: {SPELLINGS}. Or leave it out."
            )
    if relative_margin is not None and not 0 <= relative_margin <= 1:
        raise ValueError(
            f"judge_relative_margin={relative_margin} must be in [0, 1], a share of the positive's score."
        )
    if absolute_margin is not None and not 0 <= absolute_margin < inf:
        raise ValueError(f"judge_absolute_margin={absolute_margin} must be 0 or more, a difference of two scores.")


def _margins(scale: Scale, relative: float | None, absolute: float | None) -> dict[str, float | None]:
    """The margins that are asked for, or else those of the scale.

    Raises:
        ValueError: for a share of scores that may be negative without end.
    """
    if relative is None and absolute is None:
        relative, absolute = scale.relative_margin, scale.absolute_margin
    elif relative is not None and scale.lowest == -inf:
        raise ValueError(
            f"judge_relative_margin={relative} is a share of the positive's score. Expected: a judge of probabilities "
            f"(0 to 1), cosines (-1 to 1) or other scores of 0 or more; this one gives {scale}. Fix: "
            f"judge_absolute_margin={LOGITS.absolute_margin:g}, or a sigmoid (CrossEncoder(..., "
            "activation_fn=torch.nn.Sigmoid()))."
        )
    return {"judge_relative_margin": relative, "judge_absolute_margin": absolute}
