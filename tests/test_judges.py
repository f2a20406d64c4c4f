"""Judges of mined candidates: what they hold for relevant is that of a plain loop, asked about no more, and once."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from math import exp
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_server import chat_server, say, share_of
from conftest import save_llm, train_tokenizer
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification

from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, Task, build_model
from st_llm_embed.cli import main
from st_llm_embed.data import check_contrastive_columns, load_rows
from st_llm_embed.encoding import json_server
from st_llm_embed.mining import ChatJudge, judged_pairs, load_judge, mine_negatives
from st_llm_embed.mining.bm25_judge import BM25Judge, words
from st_llm_embed.mining.cross_encoder_judge import CrossEncoderJudge
from st_llm_embed.mining.judge import BM25_SCORES, LOGITS, PROBABILITIES, TRIAL, Scale
from st_llm_embed.mining.judges import find_judge
from st_llm_embed.mining.negatives import Mined
from st_llm_embed.modules.reference import TEXTS
from st_llm_embed.training import mined_data, stages, train_stages
from st_llm_embed.training.plan import describe_run

WORDS = [f"word{i}" for i in range(40)]
Score = Callable[[str, str], float]


def make_teacher(seed: int = 0) -> SentenceTransformer:
    """Random vectors of words, averaged."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")


@pytest.fixture(scope="module")
def data() -> tuple[Dataset, list[str]]:
    """40 rows with 30 anchors, and 120 texts; some of them share words with an anchor, as its positive does."""
    draw = random.Random(0)
    anchors = [" ".join(draw.choices(WORDS, k=5)) for _ in range(30)]
    anchors += draw.choices(anchors, k=10)
    positives = [" ".join([*anchor.split()[: draw.randrange(1, 5)], *draw.choices(WORDS, k=4)]) for anchor in anchors]
    corpus = [" ".join([*draw.choice(anchors).split()[:2], *draw.choices(WORDS, k=4)]) for _ in range(120)]
    return Dataset.from_dict({"anchor": anchors, "positive": positives}), list(dict.fromkeys(corpus))


@pytest.fixture(scope="module")
def cross_encoders(tmp_path_factory) -> dict[str, CrossEncoder]:
    """One that gives probabilities, one of the same weights that gives logits."""
    folder = tmp_path_factory.mktemp("judge") / "cross-encoder"
    tokenizer = train_tokenizer()
    tokenizer.pad_token = "</s>"
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=2, initializer_range=0.7, **shape)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    activations = {"probabilities": torch.nn.Sigmoid(), "logits": torch.nn.Identity()}
    return {name: CrossEncoder(str(folder), device="cpu", activation_fn=of) for name, of in activations.items()}


@pytest.fixture(scope="module")
def tables(data, cross_encoders) -> dict[str, dict[tuple[str, str], float]]:
    """The cross-encoders' scores of all pairs."""
    rows, corpus = data
    pairs = [(query, text) for query in {*rows["anchor"]} for text in {*corpus, *rows["positive"]}]
    logits = cross_encoders["logits"].predict(pairs, batch_size=256)
    of = {"logits": logits, "probabilities": 1 / (1 + np.exp(-logits))}
    return {kind: dict(zip(pairs, scores.tolist(), strict=True)) for kind, scores in of.items()}


class WordJudge:
    """The share of the query's words that the document has; counts the pairs that it is asked about."""

    name, scale = "words", PROBABILITIES

    def __init__(self, lives: int = 1 << 30) -> None:
        self.identity = "0" * 16
        self.lives, self.asked = lives, Counter()

    def score(self, queries, documents, done=lambda count: None):
        pairs = list(zip(queries, documents, strict=True))
        if set(pairs) <= set(TRIAL):
            return np.full(len(pairs), 0.5)
        if len(pairs) > self.lives:
            raise KeyboardInterrupt
        self.lives -= len(pairs)
        self.asked.update(pairs)
        return np.array([share_of(*pair) for pair in pairs])


def plain_loop(rows, teacher, corpus, score: Score, margins, settings) -> tuple[list[dict], Counter, Counter]:
    """The rows that mining gives, how often the judge is asked about each pair, and how many candidates each rule
    drops."""
    relative, absolute = margins
    n, range_min, promotes = settings["num_negatives"], settings["range_min"], settings.get("judged") == "promote"
    documents = list(dict.fromkeys([*corpus, *rows["positive"]]))
    vectors = dict(zip(documents, teacher.encode_document(documents), strict=True))
    mined, found, asked, dropped = [], [], Counter(), Counter(relative_margin=0, range_min=0, judge=0)
    negatives: dict[str, list[str]] = {}
    for anchor in dict.fromkeys(rows["anchor"]):
        vector = teacher.encode_query([anchor])[0]

        def cosine(text, vector=vector):
            return vector @ vectors[text] / np.linalg.norm(vector) / np.linalg.norm(vectors[text])

        positives = [row["positive"] for row in rows if row["anchor"] == anchor]
        asked.update({(anchor, positive): 1 for positive in set(positives)})
        mean = sum(score(anchor, positive) for positive in positives) / len(positives)

        def is_relevant(text, anchor=anchor, mean=mean):
            asked[anchor, text] += 1
            limits = [mean - relative * abs(mean)] if relative is not None else []
            limits += [mean - absolute] if absolute is not None else []
            return any(score(anchor, text) > limit for limit in limits)

        others = [text for text in documents if text not in positives and text != anchor]
        best = sorted(others, key=cosine, reverse=True)[: settings["range_max"]]
        limit = min(map(cosine, positives))
        limit -= settings["relative_margin"] * abs(limit)
        above = [text for text in best if cosine(text) > limit]
        dropped["relative_margin"] += len(above)
        allowed = best[len(above) :]
        if len(allowed) < range_min + n:
            dropped["range_min"] += min(range_min, len(allowed))
            continue
        promoted, left = [text for text in above if promotes and is_relevant(text)], []
        for text in allowed:
            if len(left) == range_min + n:
                break
            if is_relevant(text):
                dropped["judge"] += 1
                promoted += [text] * promotes
            else:
                left.append(text)
        dropped["range_min"] += min(range_min, len(left))
        if len(left) == range_min + n:
            negatives[anchor] = left[range_min:]
            found += [(anchor, text) for text in promoted]
    pairs = [(row["anchor"], row["positive"]) for row in rows if row["anchor"] in negatives]
    for anchor, positive in pairs + found:
        texts = [positive, *negatives[anchor]]
        columns = ["positive", *(f"negative_{i + 1}" for i in range(n))]
        row = {"anchor": anchor, **dict(zip(columns, texts, strict=True))}
        mined.append({**row, "scores": [score(anchor, text) for text in texts]})
    return mined, asked, dropped


def same_rows(found: list[dict], expected: list[dict]) -> None:
    texts = [[{key: row[key] for key in row if key != "scores"} for row in rows] for rows in (found, expected)]
    assert texts[0] == texts[1]
    np.testing.assert_allclose([row["scores"] for row in found], [row["scores"] for row in expected], atol=1e-5)


SETTINGS = {"num_negatives": 3, "range_min": 1, "range_max": 30, "relative_margin": 0.1}


@pytest.mark.parametrize("judged", ["drop", "promote"])
@pytest.mark.parametrize(
    ("kind", "margins"),
    [("probabilities", (0.5, None)), ("probabilities", (0.3, 0.2)), ("logits", (None, 3.0)), ("words", (0.5, None))],
)
def test_what_a_judge_drops_and_promotes_is_that_of_a_plain_loop(data, cross_encoders, tables, kind, margins, judged):
    rows, corpus = data
    judge = WordJudge() if kind == "words" else cross_encoders[kind]
    table = tables.get(kind)
    given = {} if margins in ((0.5, None), (None, 3.0)) else {"judge_absolute_margin": margins[1]}
    given |= {"judge_relative_margin": margins[0]} if given else {}
    settings = {**SETTINGS, "judged": judged, **given}

    def score(query: str, document: str) -> float:
        return share_of(query, document) if table is None else table[query, document]

    expected, asked, dropped = plain_loop(rows, make_teacher(), corpus, score, margins, settings)
    mined, report, without = mine_negatives(rows, make_teacher(), corpus, judge=judge, **settings)
    same_rows(mined.to_list(), expected)
    check_contrastive_columns(mined, "mined", negatives=3)
    of_judge = sum(count for rule, count in report.dropped.items() if rule.startswith("judge"))
    assert of_judge == dropped["judge"] > 5 and report.dropped["relative_margin"] == dropped["relative_margin"] > 5
    assert report.dropped["range_min"] == dropped["range_min"]
    promoted = len(mined) - (40 - report.rows_dropped)
    assert report.judged["promoted"] == promoted and (promoted > 5) == (judged == "promote")
    # It was asked about every pair once, the positives among them.
    assert set(asked.values()) == {1}
    rows_twice = 40 - len({(row["anchor"], row["positive"]) for row in rows})
    assert report.judged["pairs"] == len(asked) + rows_twice
    if kind == "words":
        assert judge.asked == asked
    else:
        assert any("held for relevant by the judge (judge_" in reason for reason in without["reason"])
    plain = mine_negatives(rows, make_teacher(), corpus, **SETTINGS).rows
    assert plain["negative_1"][:] != mined["negative_1"][: len(plain)] and "scores" not in plain.column_names


def test_scores_are_computed_once_also_by_one_that_was_killed(data, tmp_path, monkeypatch):
    rows, corpus = data
    monkeypatch.setattr(judged_pairs, "PAIRS", 10)
    alone = WordJudge()
    expected = mine_negatives(rows, make_teacher(), corpus, judge=alone, **SETTINGS)
    total = len(alone.asked)
    assert total > 100 and set(alone.asked.values()) == {1}
    killed = WordJudge(lives=75)
    with pytest.raises(KeyboardInterrupt):
        mine_negatives(rows, make_teacher(), corpus, judge=killed, cache_folder=tmp_path, **SETTINGS)
    assert sum(killed.asked.values()) in range(66, 76)
    resumed = WordJudge()
    mined = mine_negatives(rows, make_teacher(), corpus, judge=resumed, cache_folder=tmp_path, **SETTINGS)
    assert mined.rows.to_dict() == expected.rows.to_dict() and mined.report == expected.report
    assert killed.asked + resumed.asked == alone.asked
    again = WordJudge()
    mined = mine_negatives(rows, make_teacher(), corpus, judge=again, cache_folder=tmp_path, **SETTINGS)
    assert not again.asked and mined.rows.to_dict() == expected.rows.to_dict()
    # A shard that was cut off is computed again, and another judge's scores are its own.
    shard = sorted((tmp_path / "judged").rglob("*.npy"))[0]
    shard.write_bytes(shard.read_bytes()[:-5])
    assert mine_negatives(rows, make_teacher(), corpus, judge=again, cache_folder=tmp_path, **SETTINGS).rows[0]
    assert 0 < sum(again.asked.values()) <= 10
    other = WordJudge()
    other.identity = "1" * 16
    mine_negatives(rows, make_teacher(), corpus, judge=other, cache_folder=tmp_path, **SETTINGS)
    assert other.asked == alone.asked
    assert json.loads(next((tmp_path / "judged").rglob("judge.json")).read_text())["judge"] == "words"


def test_two_cross_encoders_are_told_apart_and_one_stays_itself(cross_encoders, tmp_path):
    identities = {CrossEncoderJudge(model).identity for model in cross_encoders.values()}
    model = cross_encoders["probabilities"]
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = load_judge(str(tmp_path / "saved"))
    assert CrossEncoderJudge(loaded).identity == CrossEncoderJudge(model).identity in identities
    with torch.no_grad():
        loaded.transformers_model.classifier.bias += 1e-4
    identities.add(CrossEncoderJudge(loaded).identity)
    loaded.prompts = {"query": "Find it: "}
    loaded.default_prompt_name = "query"
    identities.add(CrossEncoderJudge(loaded).identity)
    assert len(identities) == 4


def test_a_cross_encoder_scores_as_predict_does_whatever_the_batches(cross_encoders, data):
    queries, documents = data[0]["anchor"][:20], data[1][:20]
    pairs = list(zip(queries, documents, strict=True))
    for model in cross_encoders.values():
        expected = model.predict(pairs)
        assert expected.std() > 0.05
        for tokens in (1, 300, 4096):
            counted = []
            found = CrossEncoderJudge(model, tokens).score(queries, documents, counted.append)
            np.testing.assert_allclose(found, expected, atol=1e-5)
            assert sum(counted) == 20 and (len(counted) == 20) == (tokens == 1)


def test_another_embedding_model_judges_by_its_cosines(data, tmp_path):
    rows, corpus = data
    judge = make_teacher(seed=1)

    def score(query: str, document: str) -> float:
        a, b = judge.encode_query(query), judge.encode_document(document)
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    expected, asked, dropped = plain_loop(rows, make_teacher(), corpus, score, (0.2, None), SETTINGS)
    encoded: list[str] = []
    plain = judge.encode

    def encode(inputs, **kwargs):
        encoded.extend(text for text in inputs if text not in TEXTS)
        return plain(inputs, **kwargs)

    judge.encode = encode
    mined = mine_negatives(rows, make_teacher(), corpus, judge=judge, cache_folder=tmp_path, **SETTINGS)
    same_rows(mined.rows.to_list(), expected)
    assert mined.report.dropped["judge_relative_margin"] == dropped["judge"] > 5
    # Each text once for each side, and of the corpus what was asked about.
    texts = Counter(dict.fromkeys({query for query, _ in asked}, 1)) + Counter({text for _, text in asked})
    assert Counter(encoded) == texts and len({text for _, text in asked}) < len({*corpus, *rows["positive"]})
    encoded.clear()
    again = mine_negatives(rows, make_teacher(), corpus, judge=judge, cache_folder=tmp_path, **SETTINGS)
    assert not encoded and again.rows.to_dict() == mined.rows.to_dict()


def test_bm25_is_that_of_bm25s():
    bm25s = pytest.importorskip("bm25s", reason="bm25s is not here (pip install bm25s)")
    draw = random.Random(0)
    common = ["the", "a", "of", "Sort"]
    documents = [" ".join(draw.choices(WORDS + common * 9, k=draw.randrange(1, 30))) for _ in range(80)] + ["-"]
    queries = [" ".join(draw.sample(WORDS + common, 4)) + " unseen?" for _ in range(20)]
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index([words(document) for document in documents], show_progress=False)
    known = set(index.vocab_dict)
    judge = BM25Judge(queries, documents)
    for query in queries:
        expected = index.get_scores([word for word in words(query) if word in known])
        found = judge.score([query] * len(documents), documents)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert found.max() > 0.5 and found[-1] == 0 == judge.score([query], ["unseen"])[0]
    assert judge.identity == BM25Judge(queries, documents).identity != BM25Judge(queries, documents[1:]).identity


def test_bm25_of_the_corpus_that_is_searched(data, tmp_path):
    rows, corpus = data
    corpus = [*corpus, *corpus[:30]]  # a text that is there twice counts once
    documents = list(dict.fromkeys([*corpus, *rows["positive"]]))
    judge = BM25Judge(rows["anchor"], documents)
    expected, _, _ = plain_loop(
        rows,
        make_teacher(),
        corpus,
        lambda *pair: float(judge.score(*([text] for text in pair))[0]),
        (0.2, None),
        SETTINGS,
    )
    mined = mine_negatives(
        rows, make_teacher(), corpus, judge="bm25", judge_relative_margin=0.2, cache_folder=tmp_path, **SETTINGS
    )
    same_rows(mined.rows.to_list(), expected)
    assert [folder.name for folder in (tmp_path / "judged").iterdir()] == [judge.identity]


@pytest.fixture
def llm_server() -> Iterator[ThreadingHTTPServer]:
    with chat_server() as server:
        yield server


def test_an_llm_is_asked_for_its_yes(data, llm_server, tmp_path):
    rows, corpus = data
    judge = load_judge(f"{llm_server.url}#judge", instruction="Find the answer")
    assert isinstance(judge, ChatJudge)

    def score(query: str, document: str) -> float:
        yes, more, no, _ = (exp(value) for _, value in say(share_of(query, document)))
        return (yes + more) / (yes + more + no)

    settings = {**SETTINGS, "judge": judge, "judge_relative_margin": 0.45, "cache_folder": tmp_path}
    expected, asked, _ = plain_loop(rows, make_teacher(), corpus, score, (0.45, None), SETTINGS)
    mined = mine_negatives(rows, make_teacher(), corpus, **settings)
    same_rows(mined.rows.to_list(), expected)
    assert len(llm_server.asked) == len(asked) + len(TRIAL)
    body = llm_server.asked[-1]
    assert (body["model"], body["max_tokens"], body["temperature"], body["logprobs"]) == ("judge", 1, 0, True)
    assert "The task: Find the answer\n" in body["messages"][0]["content"] and body["top_logprobs"] == 20
    mine_negatives(rows, make_teacher(), corpus, **settings)
    assert len(llm_server.asked) == len(asked) + 2 * len(TRIAL)
    # The only model's name is found, and makes no other judge of it; another task does.
    assert load_judge(llm_server.url, instruction="Find the answer").identity == judge.identity
    assert load_judge(llm_server.url).identity != judge.identity
    long = ChatJudge(llm_server.url, "judge").score(["word1"], ["word2 " * 2_000 + "word1"])
    assert long[0] == pytest.approx(0, abs=1e-6)  # what is cut off is not seen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": lambda share: None}, "answers without the log-probabilities of its first token"),
        ({"tokens": lambda share: [("<think>", -0.01), ("yes", -9.0)]}, "neither yes nor no.*'<think>', 'yes'"),
        ({"names": ["a", "b"]}, "has 2 models: a, b. Say which is the judge: http.*/v1#a"),
        ({"names": []}, "has 0 models. Say which is the judge: http.*/v1#NAME"),
    ],
)
def test_a_server_that_is_no_judge_is_refused_before_the_work(data, llm_server, monkeypatch, change, message):
    for name, value in change.items():
        setattr(llm_server, name, value)
    teacher = make_teacher()
    monkeypatch.setattr(teacher, "encode", None)  # is not called
    with pytest.raises(ValueError, match=message):
        mine_negatives(data[0], teacher, data[1], judge=load_judge(llm_server.url))


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr(json_server, "WAITS", ())
    with pytest.raises(OSError, match="http://127.0.0.1:9/v1 does not answer"):
        load_judge("http://127.0.0.1:9/v1")


def other_judge(scale: Scale = PROBABILITIES, value: float | None = None, shape: tuple[int, ...] = ()) -> WordJudge:
    judge = WordJudge()
    judge.scale = scale
    judge.score = lambda queries, documents, done=None: np.full((len(queries), *shape), value)
    return judge


def test_bad_judges_are_refused_before_the_work(data, cross_encoders, tmp_path, monkeypatch):
    teacher = make_teacher()
    monkeypatch.setattr(teacher, "encode", None)
    folder = str(tmp_path / "three")
    config = cross_encoders["logits"].transformers_model.config
    BertForSequenceClassification(
        BertConfig(**{**config.to_dict(), "num_labels": 3, "id2label": None})
    ).save_pretrained(folder)
    cross_encoders["logits"].tokenizer.save_pretrained(folder)
    tanh = CrossEncoder(cross_encoders["logits"].transformers_model.name_or_path, activation_fn=torch.nn.Tanh())
    logits = {"judge": cross_encoders["logits"]}
    for settings, message in (
        (
            {**logits, "judge_relative_margin": 0.05},
            r"Expected: a judge of probabilities \(0 to 1\), cosines.*gives logits",
        ),
        (
            {"judge": tanh},
            "the activation Tanh. Expected: Sigmoid, which gives probabilities, from 0 to 1, or Identity",
        ),
        ({"judge": load_judge(folder)}, "num_labels=3. A judge gives one score to a pair"),
        (
            {"judge": other_judge(value=7.25)},
            "gives 7.25 for the query .* Expected: probabilities, from 0 to 1. Fix: ",
        ),
        ({"judge": other_judge(value=-0.5)}, "gives -0.5 for the query .* Expected: probabilities, from 0 to 1"),
        ({"judge": other_judge(BM25_SCORES, -1.0)}, "gives -1.0 .* Expected: BM25 scores, from 0 to inf"),
        ({"judge": other_judge(LOGITS, float("nan"))}, "gives nan .* Expected: logits, from -inf to inf"),
        ({"judge": other_judge(value=0.5, shape=(2,))}, r"scores of the shape \(2, 2\) for 2 pairs"),
        ({"judge": "bm52"}, "The judge is 'bm52'. Expected: a CrossEncoder"),
        ({"judge": 3}, "The judge is a int. Expected: a CrossEncoder"),
        ({"judge": "bm25", "judged": "keep"}, "judged='keep' must be one of drop, promote"),
        ({"judged": "promote"}, "judged='promote' has no effect without a judge. Name one: the folder or Hub id"),
        ({"judge_absolute_margin": 1.0}, "judge_absolute_margin=1.0 has no effect without a judge"),
        ({"judge": "bm25", "judge_relative_margin": 1.5}, r"judge_relative_margin=1.5 must be in \[0, 1\]"),
        ({"judge": "bm25", "judge_absolute_margin": -1.0}, "judge_absolute_margin=-1.0 must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            mine_negatives(data[0], teacher, data[1], **settings)


def test_scores_that_go_wrong_later_name_their_pair(data, tmp_path):
    judge = WordJudge()
    judge.score = lambda queries, documents, done=None: np.array([np.inf if "word7" in d else 0.5 for d in documents])
    with pytest.raises(ValueError, match=r"The judge words gives inf for the query 'word.*document '.*word7"):
        mine_negatives(*data[:1], make_teacher(), data[1], judge=judge, cache_folder=tmp_path)


def test_a_judge_is_told_by_its_files(cross_encoders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cross_encoders["logits"].save_pretrained("saved")
    make_teacher().save_pretrained("bm25")
    save_llm(tmp_path / "llm")
    Path("empty").mkdir()
    plain = cross_encoders["logits"].transformers_model.name_or_path
    assert [find_judge(name)[1] for name in (plain, "saved", "./bm25")] == [
        *["CrossEncoder"] * 2,
        "SentenceTransformer",
    ]
    assert find_judge("bm25") == (None, "bm25") and find_judge("https://x/v1#y") == (None, "https://x/v1#y")
    assert isinstance(load_judge("./bm25"), SentenceTransformer) and load_judge("bm25") == "bm25"
    loaded = load_judge("saved")
    assert isinstance(loaded, CrossEncoder) and isinstance(loaded.activation_fn, torch.nn.Identity)
    with pytest.raises(ValueError, match="The judge 'llm' is a causal LLM. A judge is the folder .*vllm serve"):
        find_judge("llm")
    with pytest.raises(ValueError, match="The judge 'empty' is no model"):
        find_judge("empty")
    config = json.loads(Path("saved/config.json").read_text())
    config["sbert_ce_default_activation_function"] = "torch.hub.load"
    Path("saved/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'torch.hub.load' is no activation of torch.nn"):
        load_judge("saved")


RUN = {"num_negatives": 1, "range_max": 30, "judged": "promote", "judge_relative_margin": 0.3}


@pytest.fixture
def mined_here(data, cross_encoders, tmp_path, monkeypatch) -> Mined:
    """What Python gives, in a folder with the rows, the corpus, the teacher and the judge."""
    monkeypatch.chdir(tmp_path)
    data[0].select(range(15)).to_json("rows.jsonl")
    Dataset.from_dict({"text": data[1]}).to_json("corpus.jsonl")
    make_teacher().save_pretrained("teacher")
    judge = cross_encoders["probabilities"]
    judge.save_pretrained("judge")
    mined = mine_negatives(load_rows("rows.jsonl"), make_teacher(), data[1], judge=judge, **RUN)
    assert mined.report.judged["promoted"] > 5 and mined.report.judged["relevant"] > 5
    return mined


def same_folder(folder: str, mined: Mined) -> None:
    rows = [json.loads(line) for line in Path(folder, "train.jsonl").read_text().splitlines()]
    same_rows(rows, mined.rows.to_list())
    report, judged = json.loads(Path(folder, "report.json").read_text())["judged"], mined.report.judged
    assert [report[key] for key in ("pairs", "relevant", "promoted")] == [*judged.values()][:3]
    assert report["scores"]["candidate"] == pytest.approx(judged["scores"]["candidate"])


def test_the_command_gives_what_python_does(mined_here, capsys):
    command = ["mine", "rows.jsonl", "teacher", "--corpus", "corpus.jsonl", "--output", "out", "--judge", "judge"]
    flags = [word for name, value in RUN.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main([*command, *flags]) == 0
    said, judged = capsys.readouterr().out, mined_here.report.judged
    assert f"Wrote {15 - mined_here.report.rows_dropped} of 15 rows" in said
    assert (
        f"was asked about {judged['pairs']} pairs, and holds {judged['relevant']} candidates for relevant; "
        f"{judged['promoted']} of them became positives" in said
    )
    same_folder("out", mined_here)
    assert json.loads(Path("out", "report.json").read_text())["settings"]["judge"] == "judge"


def test_a_configuration_gives_what_python_does_and_stages_read_scores_or_not(mined_here, llm, monkeypatch):
    config = {
        "output": "run",
        "model": {"base": llm, "recipe": "mean", "max_seq_length": 32},
        "arguments": {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1e-3, "logging_steps": 1},
        "data": {
            "faq": {
                **{"read": "load_dataset", "path": "json", "data_files": "rows.jsonl", "split": "train"},
                "instruction": "Find it",
                "mine": {"teacher": "./teacher", "corpus": "corpus.jsonl", "judge": "./judge", **RUN},
            }
        },
        "stages": [
            {"name": "hard", "data": ["faq"], "arguments": {"stage": 2}},
            {"name": "soft", "data": ["faq"], "arguments": {"stage": 2, "soft_label_weight": 1.0}},
        ],
    }
    make, trainers = stages._trainer, []

    def noted(*args, **kwargs):
        trainers.append(make(*args, **kwargs))
        return trainers[-1]

    monkeypatch.setattr(stages, "_trainer", noted)
    train_stages(config)
    same_folder("run/mined/faq", mined_here)
    logs = [trainer.state.log_history for trainer in trainers if trainer.state.global_step]
    assert [any("soft_labels" in entry for entry in log) for log in logs] == [False, True]


def test_the_scores_are_what_the_loss_on_soft_labels_reads(data, llm, tmp_path):
    rows, corpus = data
    judge = WordJudge()
    mined = mine_negatives(rows, make_teacher(), corpus, judge=judge, **SETTINGS).rows
    assert mined.column_names[-1] == "scores"
    for row in mined:
        texts = [row["positive"], *(row[f"negative_{i}"] for i in (1, 2, 3))]
        assert row["scores"] == pytest.approx([share_of(row["anchor"], text) for text in texts])
    model = build_model(llm, "mean", max_seq_length=32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = LLMEmbedTrainingArguments(
        str(tmp_path), stage=2, max_steps=1, learning_rate=1e-2, per_device_train_batch_size=8, report_to=[],
        soft_label_weight=1.0, contrastive_weight=0.0, logging_steps=1,
    )  # fmt: skip
    trainer = LLMEmbedTrainer(model, args, {"find": mined}, tasks=[Task("find", "Find it")])
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["anchor_soft_labels"].shape == (8, 4)
    trainer.train()
    assert trainer.state.log_history[0]["soft_labels"] > 0
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_judge_takes_the_instruction_of_the_task_and_may_be_an_earlier_stage(data, llm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data[0].select(range(12)).to_json("rows.jsonl")
    build_model(llm, "mean", max_seq_length=32).save_pretrained("teacher")
    judges, mine = [], mined_data.mine_negatives

    def noted(*args, **kwargs):
        judges.append(kwargs["judge"])
        return mine(*args, **kwargs)

    monkeypatch.setattr(mined_data, "mine_negatives", noted)
    read = {"read": "load_dataset", "path": "json", "data_files": "rows.jsonl", "split": "train"}
    settings = {"num_negatives": 1, "relative_margin": None, "teacher": "./teacher", "judge_absolute_margin": 0.0}
    config = {
        "output": "run",
        "model": {"base": llm, "recipe": "mean", "max_seq_length": 32},
        "arguments": {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1e-3},
        "data": {
            "plain": {**read, "instruction": "Find it"},
            "mined": {**read, "instruction": "Mine it", "mine": {**settings, "judge": "one"}},
        },
        "stages": [{"name": "one", "data": ["plain"]}, {"name": "two", "data": ["mined"], "arguments": {"stage": 2}}],
    }
    assert "negatives of mined are mined first, by teacher, judged by one, unless" in describe_run(config)
    train_stages(config)
    assert judges[0].prompts["query"] == "Instruct: Mine it\nQuery: "
    trained = SentenceTransformer("run/1-one/model", trust_remote_code=True)
    weights = [model.state_dict()["0.model.norm.weight"] for model in (judges[0], trained)]
    assert torch.equal(*weights) and not torch.equal(weights[0], torch.ones_like(weights[0]))
    config["data"]["mined"]["mine"]["judge"] = "two"
    with pytest.raises(ValueError, match="data.mined.mine: the judge 'two' is a stage that comes after"):
        train_stages({**config, "output": "run2"})
    config["data"]["mined"]["mine"] = {**settings, "judged": "promote"}
    with pytest.raises(ValueError, match="data.mined: judged='promote' has no effect without a judge"):
        train_stages({**config, "output": "run2"})
    config["data"]["mined"]["mine"] = {**settings, "judge": llm}
    with pytest.raises(ValueError, match="data.mined: The judge .* is a causal LLM"):
        train_stages({**config, "output": "run2"})
