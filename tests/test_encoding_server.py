"""A server as the encoder: the model's own vectors, or a sentence that says what is wrong with the server's."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from conftest import TEXTS, save_llm
from embedding_server import embedding_server
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from st_llm_embed import build_model
from st_llm_embed.cli import main
from st_llm_embed.encoding import ServerEncoder, json_server, read_shards
from st_llm_embed.hub import save_sealed

PROMPTS = {
    "query": "Instruct: Find it\nQuery: ",
    "document": "passage: ",
    "quoted": "The text {text} in eight words: ",
    "plain": "",
}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("published")
    model = build_model(save_llm(folder / "llm"), "mean", max_seq_length=64)
    model.prompts.update({name: prompt for name, prompt in PROMPTS.items() if "{text}" not in prompt})
    save_sealed(model, folder / "model")
    return str(folder / "model")


@pytest.fixture(scope="module")
def model(published) -> SentenceTransformer:
    return SentenceTransformer(published)


@pytest.fixture
def no_wait(monkeypatch):
    monkeypatch.setattr(json_server, "WAITS", (0.0, 0.0))


def encoder(server, published: str, **settings) -> ServerEncoder:
    return ServerEncoder(server.url, published, served_name="served", **settings)


@pytest.mark.parametrize("side", ["query", "document"])
def test_a_server_gives_the_models_vectors_under_its_prompts(published, model, side):
    """Of short texts and of those that are cut; in many requests at once, each of which it takes."""
    texts = [*TEXTS, *(f"text {i} " * (i % 50) for i in range(300))]
    counted = []
    with embedding_server(model) as server:
        ours = encoder(server, published, side=side)
        found = ours.encode(texts, counted.append)
        assert all(text.startswith(PROMPTS[side]) for texts, _ in server.received for text in texts)
    expected = {"query": model.encode_query, "document": model.encode_document}[side](texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert sum(counted) == len(texts) and len(counted) > 8
    tokens = ours.count_tokens(texts)
    own = model.tokenizer([PROMPTS[side] + text for text in texts])["input_ids"]
    assert ours.longest == 64 < max(tokens) and tokens.tolist() == [len(row) for row in own]


@pytest.mark.parametrize("truncation_side", ["left", "right"])
@pytest.mark.parametrize("prompt", PROMPTS.values())
def test_a_text_is_cut_to_what_the_model_takes(published, model, prompt, truncation_side):
    with embedding_server(model) as server:
        ours = encoder(server, published)
    ours.prompt, ours.tokenizer.truncation_side = prompt, truncation_side
    for text in [*TEXTS, "word " * 15, "日本語 🐈 word " * 9, "antidisestablishmentarianism" * 9, "é" * 300]:
        whole, cut = ours.count_tokens([text])[0], ours._cut(text)
        if whole <= 64:
            assert cut == text
        else:
            assert 60 <= ours.count_tokens([cut])[0] <= 64 and len(cut) < len(text)
            assert text.endswith(cut) if truncation_side == "left" else text.startswith(cut)
    ours.prompt = "word " * 80  # no room for any text
    assert ours._cut("word " * 80) == ""


def test_an_answer_is_sorted_by_its_numbers(published, model):
    with embedding_server(model, lambda rows: rows[::-1]) as server:
        found = encoder(server, published).encode(TEXTS)
    np.testing.assert_allclose(found, model.encode_document(TEXTS), atol=1e-5)


def test_a_server_with_other_vectors_is_refused(published, model):
    last_token = SentenceTransformer(published)
    last_token[1] = Pooling(32, "lasttoken")
    other = SentenceTransformer(published)
    other.encode = lambda texts, prompt: model.encode([text.partition("Query: ")[2] for text in texts], prompt="")
    for faulty in (last_token, other):  # the latter drops the prompt
        with embedding_server(faulty) as server:
            with pytest.raises(
                ValueError, match="gives other vectors than the published model.*the cosine is"
            ) as said:
                encoder(server, published, side="query")
        assert -1 <= float(re.search(r"the cosine is (-?[\d.]+\d)", str(said.value))[1]) < 0.99
    narrow = SentenceTransformer(published, truncate_dim=8)
    with embedding_server(narrow) as server, pytest.raises(ValueError, match="vectors of 8 numbers.* has 32"):
        encoder(server, published)


FAULTS = {
    "one too few": (lambda rows: rows[:-1], "answered 2 vectors for 3 texts"),
    "one twice": (lambda rows: [rows[0], rows[0], rows[2]], r"3 vectors for 3 texts, numbered \[0, 0, 2\]"),
    "null": (
        lambda rows: [{**row, "embedding": [None] * 32} for row in rows],
        "NaN, infinity or null for 'passage: C",
    ),
    "NaN": (lambda rows: [{**row, "embedding": [float("nan")] * 32} for row in rows], "NaN, infinity or null for"),
    "base64": (lambda rows: [{**row, "embedding": "AAAA"} for row in rows], "something else than embeddings"),
    "ragged": (lambda rows: [{**row, "embedding": [0.0] * row["index"]} for row in rows], "else than embeddings"),
    "no numbers": (lambda rows: [{"embedding": row["embedding"]} for row in rows], "else than embeddings"),
    "numbers alone": (lambda rows: [{**row, "embedding": 1.0} for row in rows], r"of the shape \(3,\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_answer_is_refused(published, model, fault):
    change, said = FAULTS[fault]
    with embedding_server(model, change) as server, pytest.raises(ValueError, match=said):
        encoder(server, published)


def test_an_error_says_what_the_server_said(published, model, no_wait):
    with embedding_server(model) as server:
        with pytest.raises(OSError, match="answered 404.*The model `unknown` does not exist"):
            ServerEncoder(server.url, published, served_name="unknown")
        ours = encoder(server, published)
        server.longest = 10
        with pytest.raises(OSError, match="answered 400.*maximum context length is 10 tokens"):
            ours.encode(["word " * 30])
        server.longest, server.busy = 64, 3
        with pytest.raises(OSError, match="answered 503.*Model is overloaded"):
            ours.encode(["a"])
        assert server.busy == 0
    with pytest.raises(OSError, match="does not answer: .*Is it the right address"):
        ours.encode(["a"])
    with pytest.raises(OSError, match="does not answer"):
        encoder(server, published)


def test_a_busy_server_is_asked_again(published, model, no_wait):
    with embedding_server(model) as server:
        server.busy = 2
        found = encoder(server, published).encode(TEXTS)
        assert len(server.received) == 4
    np.testing.assert_allclose(found, model.encode_document(TEXTS), atol=1e-5)


def test_what_cannot_be_compared_is_refused_before_the_server_is_asked(published, tmp_path):
    for url in ("localhost:8000/v1", "file:///etc/passwd"):
        with pytest.raises(ValueError, match="must begin with http:// or https://"):
            ServerEncoder(url, published)
    away = "http://127.0.0.1:9/v1"
    with pytest.raises(ValueError, match="side='doc' is unknown.*document"):
        ServerEncoder(away, published, side="doc")
    with pytest.raises(ValueError, match="prompt_name='docs' is unknown. The model has: .*query"):
        ServerEncoder(away, published, prompt_name="docs")
    SentenceTransformer(published).save(str(tmp_path / "unsealed"))
    (tmp_path / "unsealed" / "reference.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="has no reference.json.*st-llm-embed seal"):
        ServerEncoder(away, str(tmp_path / "unsealed"))


def test_the_command_encodes_by_a_server(published, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    texts = [" ".join([f"text {i}"] * (1 + i % 20)) for i in range(45)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    with embedding_server(model) as server:
        command = ["encode", published, str(corpus), "--output", str(tmp_path / "vectors"), "--shard-size", "20"]
        command += ["--url", server.url, "--served-name", "served"]
        assert main(command) == 0
        assert "has 45 texts in 3 shards" in capsys.readouterr().out
        assert {key for _, key in server.received} == {"Bearer secret-key"}
        asked = len(server.received)
        assert main(command) == 0  # of a corpus that is there, the checks alone
        assert len(server.received) == asked + 2
        assert main([*command, "--tokens-per-batch", "9"]) != 0
        assert "--tokens-per-batch is of a model that computes here" in capsys.readouterr().err
    ids, vectors = zip(*read_shards(tmp_path / "vectors"), strict=True)
    assert sum(ids, []) == [f"d{i}" for i in range(45)]
    np.testing.assert_allclose(np.concatenate(vectors), model.encode_document(texts), atol=1e-5)
    written = b"".join(file.read_bytes() for file in (tmp_path / "vectors").iterdir())
    assert b"secret-key" not in written
