"""A server's and a client's vectors against reference.json: right ones pass, and what is wrong is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_llm
from embedding_server import embedding_server
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from test_encoding_server import FAULTS as FAULTY_ANSWERS

from st_llm_embed import build_model
from st_llm_embed.cli import main
from st_llm_embed.encoding import json_server
from st_llm_embed.hub import save_sealed
from st_llm_embed.modules.special_tokens import drop_text_end
from st_llm_embed.serving.server_check import check_server, check_vectors

PROMPTS = {"query": "Instruct: Find it\nQuery: ", "document": "passage: ", "plain": ""}
RECIPES = ("mean", "last-token", "nv-embed", "llara")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A sealed model of each recipe; llara has its own prompts, with a part after the text."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    llm = save_llm(root / "llm")
    for recipe in RECIPES:
        model = build_model(llm, recipe, max_seq_length=64)
        model.prompts.update({} if recipe == "llara" else PROMPTS)
        save_sealed(model, root / recipe)
    return {recipe: str(root / recipe) for recipe in RECIPES}


class Served(SentenceTransformer):
    """A model as an engine that knows its prompts serves it: the prompt's tokens are found in the text."""

    def encode(self, texts, **settings):
        rows = []
        for text in texts:
            prompt = max((p for p in self.prompts.values() if text.startswith(p)), key=len, default="")
            rows.append(super().encode([text[len(prompt) :]], prompt=prompt, show_progress_bar=False)[0])
        return np.array(rows)


def load(folder: str, **settings) -> SentenceTransformer:
    kind = Served if "nv-embed" in folder else SentenceTransformer
    return kind(folder, trust_remote_code=True, **settings)


def asked(folder: str, model: SentenceTransformer, **settings) -> str:
    """What the check says of a server that has the model."""
    with embedding_server(model) as server:
        server.longest = settings.pop("longest", 1 << 20)
        with pytest.raises(RuntimeError, match="does not give the model's vectors") as said:
            check_server(folder, server.url, **settings)
    return str(said.value).partition("vectors. ")[2]


@pytest.mark.parametrize("route", ["/v1/embeddings", "/embeddings", "/embed"])
@pytest.mark.parametrize("recipe", ["mean", "nv-embed"])
def test_a_right_server_passes_by_each_route(folders, recipe, route):
    with embedding_server(load(folders[recipe])) as server:
        server.longest, server.route = 1 << 20, route
        for url in (server.url, server.url.removesuffix("/v1") + "/"):
            compared = check_server(folders[recipe], url)
            assert min(compared.cosines.values()) > 1 - 1e-6 and not compared.remarks
    prompts = SentenceTransformer(folders[recipe], trust_remote_code=True).prompts
    assert compared.cosines.keys() == prompts.keys()
    assert "Instruct: Find it\nQuery: Café  №1" in {text for texts, _ in server.received for text in texts}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_server_that_refuses_long_texts_is_sent_what_the_model_takes(folders, recipe):
    with embedding_server(load(folders[recipe])) as server:
        compared = check_server(folders[recipe], server.url)
    assert compared.remarks[0].startswith("It refuses long texts, which a client has to cut: http")
    assert min(compared.cosines.values()) > 1 - 1e-6
    if recipe == "llara":
        sent = {text for texts, _ in server.received for text in texts}
        assert {"Café  №1 The next sentence:", "Café  №1 The original sentence:"} <= sent


def do_nothing(model: SentenceTransformer) -> None:
    """A server that puts the model's own tokenizer before it, and cuts what it is sent."""


def pool(mode: str) -> Callable[[SentenceTransformer], None]:
    def change(model: SentenceTransformer) -> None:
        model[1] = Pooling(32, mode)

    return change


def attend_otherwise(model: SentenceTransformer) -> None:
    backbone = model[0]
    backbone.model.config.is_causal = backbone.model.config.is_causal is False
    if hasattr(backbone, "attention"):
        backbone.attention = "causal" if backbone.model.config.is_causal else "bidirectional"


def drop_eos(model: SentenceTransformer) -> None:
    drop_text_end(model.tokenizer)


def prompt_twice(model: SentenceTransformer) -> None:
    encode = model.encode
    model.encode = lambda texts, prompt: encode([f"passage: {text}" for text in texts], prompt="")


def cut_later(model: SentenceTransformer) -> None:
    model.max_seq_length = 512


def let_prompts_into_the_pool(model: SentenceTransformer) -> None:
    model.prompts = {}


FAULTS = {  # what is done to a recipe's model, and what is said of it
    "mean, pooling": (pool("lasttoken"), "Under 'query' .*'plain' .*: pooling: the last token's state."),
    "last-token, pooling": (pool("mean"), "Under 'query' .*'plain' .*: pooling: the mean of all tokens."),
    "nv-embed, pooling": (pool("lasttoken"), "Under 'query' .*'plain' .*: pooling: the last token's state."),
    "nv-embed, the mean": (pool("mean"), "Under 'query' .*'plain' .*: pooling: the mean of all tokens."),
    "llara, pooling": (pool("cls"), "Under 'query' .*'passage' .*: pooling: the first token's state."),
    "mean, mask": (attend_otherwise, "Under 'query' .*'plain' .*: mask: causal."),
    "last-token, mask": (attend_otherwise, "Under 'query' .*'plain' .*: mask: bidirectional."),
    "nv-embed, mask": (attend_otherwise, "Under 'query' .*'plain' .*: mask: causal."),
    "mean, EOS": (drop_eos, "Under 'query' .*'plain' .*: EOS: no EOS token ends a text."),
    "last-token, EOS": (drop_eos, "Under 'query' .*'plain' .*: EOS: no EOS token ends a text."),
    "llara, EOS": (drop_eos, "Under 'query' .*'passage' .*: EOS: no EOS token ends a text."),
    "mean, prompt": (
        prompt_twice,
        "Under 'query' [^U]*: prompt: that of 'document' is there, too, before it. "
        "Under 'document' [^U]*: prompt: it is there twice. Under 'plain' [^U]*: prompt: that of 'document'.",
    ),
    "nv-embed, prompt": (
        let_prompts_into_the_pool,
        "Under 'query' [^U]*'document' [^U]*: pooling: the prompt's tokens are in the pool.",
    ),
    "mean, truncation": (
        cut_later,
        "Under 'query' [^U]*: truncation: a text of 3,[0-9]+ tokens is cut after 512, and by the model after 64.",
    ),
    "llara, truncation": (
        do_nothing,
        "Under 'query' .*: truncation: a text of 3,[0-9]+ tokens is cut with the prompt",
    ),
    "last-token, several": (
        lambda model: (attend_otherwise(model), drop_eos(model), pool("mean")(model)),
        "Under 'query' .*'plain' .*: EOS: no EOS token ends a text; mask: bidirectional; pooling: the mean of all",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_server_does_otherwise_is_named(folders, fault):
    change, said = FAULTS[fault]
    folder = folders[fault.partition(",")[0]]
    model = load(folder)
    change(model)
    told = asked(folder, model)
    assert re.match(said, told), told
    assert not {"precision", "unknown"} & set(re.findall(r"\w+", told))


def test_normalisation_and_dimensions_are_named(folders):
    whole = SentenceTransformer(folders["mean"])
    told = asked(folders["mean"], SentenceTransformer(modules=list(whole)[:2]))
    assert told.endswith("'plain' (cosine 1.00000): normalisation: the vectors are not of length 1.")
    told = asked(folders["mean"], SentenceTransformer(folders["mean"], truncate_dim=8))
    assert "dimensions: the first 8 of 32 numbers; normalisation: the vectors are not of length 1." in told
    again = SentenceTransformer(folders["mean"], truncate_dim=8)
    encode = again.encode
    again.encode = lambda texts, prompt: encode(texts, prompt=prompt, normalize_embeddings=True)
    assert asked(folders["mean"], again).endswith("dimensions: the first 8 of 32 numbers.")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_a_remark(folders, dtype):
    model = SentenceTransformer(folders["mean"], model_kwargs={"dtype": getattr(torch, dtype)})
    with embedding_server(model) as server:
        server.longest = 1 << 20
        compared = check_server(folders["mean"], server.url)
        assert f"precision: rounded as by {dtype}." in compared.remarks[0]
    pool("lasttoken")(model)
    assert f"pooling: the last token's state; precision: rounded as by {dtype}." in asked(folders["mean"], model)


def test_a_text_that_is_cut_without_eos_is_named(folders):
    """As by an engine that truncates after EOS is there."""
    model = SentenceTransformer(folders["last-token"])
    bare = SentenceTransformer(folders["last-token"])
    drop_text_end(bare.tokenizer)

    def encode(texts: list[str], prompt: str) -> np.ndarray:
        return np.array([(bare if len(text) > 1_000 else model).encode(text) for text in texts])

    served = SentenceTransformer(folders["last-token"])
    served.encode = encode
    assert "truncation: a text that is cut loses its EOS token." in asked(folders["last-token"], served)


def test_vectors_of_no_usual_fault_are_said_to_be_so(folders):
    other = SentenceTransformer(folders["mean"])
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    assert "unknown: no usual fault gives these vectors." in asked(folders["mean"], other)


def test_without_its_weights_the_numbers_are_looked_at(folders, tmp_path):
    """Prompts that were taken for another, and what shows by itself."""
    folder = shutil.copytree(folders["mean"], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    model = load(folders["mean"])
    with embedding_server(model) as server:
        server.longest = 1 << 20
        assert not check_server(folder, server.url).remarks
    prompt_twice(model)
    assert "Under 'plain'" in (told := asked(folder, model)) and "prompt: that of 'document'" in told
    assert "unknown: no usual fault gives these vectors. Only the numbers were looked at, as the model was not" in told
    model = load(folders["mean"])
    cut_later(model)
    assert "truncation: a text of 2,200 characters differs, and short ones do not." in asked(folder, model)


def vectors_of(folder: str, prompts: dict[str, str]) -> dict[str, list]:
    model = SentenceTransformer(folder, trust_remote_code=True)
    texts = json.loads(Path(folder, "reference.json").read_text())["texts"]
    return {name: model.encode(texts, prompt=prompt).tolist() for name, prompt in prompts.items()}


def test_a_clients_vectors_are_compared_by_the_same(folders, tmp_path, capsys):
    """What LangChain's user has by default: the same vectors for queries as for documents."""
    for recipe in ("mean", "nv-embed"):
        folder, file = folders[recipe], tmp_path / "vectors.json"
        file.write_text(json.dumps(vectors_of(folder, {name: PROMPTS[name] for name in ("query", "document")})))
        assert main(["check", folder, "--vectors", str(file)]) == 0
        assert "1.000000 is the least cosine under 'query'" in (out := capsys.readouterr().out) and "plain" not in out
        file.write_text(json.dumps(vectors_of(folder, {"query": "", "document": PROMPTS["document"]})))
        assert main(["check", folder, "--vectors", str(file)]) == 2
        error = capsys.readouterr().err
        assert "Under 'query'" in error and "prompt: that of 'plain'" in error and "'document' (" not in error
    one = vectors_of(folders["mean"], {"query": PROMPTS["query"].replace("\n", " ")})["query"]
    np.save(tmp_path / "vectors.npy", np.array(one, np.float32))
    assert main(["check", folders["mean"], "--vectors", str(tmp_path / "vectors.npy"), "--prompt", "query"]) == 2
    assert "prompt: its line breaks became spaces" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, prompt, said",
    [
        ([[0.0] * 32] * 3, None, "does not say under which prompt .*--prompt.*one of: query, document, plain"),
        ([[0.0] * 32] * 2, "query", "has 2 vectors, and reference.json has 3 texts"),
        ([[0.0] * 33] * 3, "query", "has vectors of 33 numbers, and the model has 32"),
        ([[0.0] * 32, [0.0] * 31, [0.0] * 32], "query", r"under 'query', has no \(texts, numbers\)"),
        ([[float("nan")] * 32] * 3, "query", "has NaN or infinity"),
        ({"qery": [[0.0] * 32] * 3}, None, "under the prompts qery. reference.json has: query, document, plain"),
        ({}, None, "under no prompt"),
        ({"document": [[0.0] * 32] * 3}, "query", r"under 'query', has no \(texts, numbers\)"),
        ("words", "query", r"has no \(texts, numbers\)"),
        ([[0.0] * 32] * 3, "queries", "prompt_name='queries' is unknown. reference.json has: query"),
    ],
)
def test_a_file_of_vectors_of_another_form_is_refused(folders, tmp_path, content, prompt, said):
    (tmp_path / "vectors.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        check_vectors(folders["mean"], tmp_path / "vectors.json", prompt)


def test_files_that_are_no_vectors_are_refused(folders, tmp_path):
    np.save(tmp_path / "int8.npy", np.zeros((3, 32), np.int8))
    with pytest.raises(ValueError, match="has vectors of int8. Give those of floating-point numbers"):
        check_vectors(folders["mean"], tmp_path / "int8.npy", "query")
    (tmp_path / "text.json").write_text("[[0.1, ")
    with pytest.raises(ValueError, match="text.json"):
        check_vectors(folders["mean"], tmp_path / "text.json", "query")
    for missing in ("no.json", "no.npy"):
        with pytest.raises(FileNotFoundError, match=missing):
            check_vectors(folders["mean"], tmp_path / missing, "query")


@pytest.mark.parametrize("fault", FAULTY_ANSWERS)
def test_a_faulty_answer_is_refused(folders, fault):
    change, _ = FAULTY_ANSWERS[fault]
    answers = {"one too few": "0 vectors for 1 texts", "one twice": None}

    def first(rows: list) -> object:
        try:
            return change(rows)
        except IndexError:  # of a request of one text
            return [*rows, *rows]

    with embedding_server(load(folders["mean"]), first) as server:
        with pytest.raises(ValueError, match=answers.get(fault) or "answered"):
            check_server(folders["mean"], server.url)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda rows: rows * 2, "answered 2 vectors for 1 texts"),
        (lambda rows: [[float("nan")] * 32], "answered NaN, infinity or null for 'word'"),
        (lambda rows: {"error": "no"}, "something else than embeddings"),
        (lambda rows: b"<html>", "something else than JSON"),
        (lambda rows: [[]], r"of the shape \(1, 0\)"),
        (lambda rows: [rows[0] * 2], "has vectors of 64 numbers, and the model has 32"),
    ],
)
def test_teis_answers_are_looked_at_likewise(folders, change, said):
    with embedding_server(load(folders["mean"]), change) as server:
        server.route = "/embed"
        with pytest.raises(ValueError, match=said):
            check_server(folders["mean"], server.url)


def test_widths_that_change_are_refused(folders):
    answered = []

    def narrower(rows: list) -> list:
        answered.append(len(rows))
        return [row[: 32 - len(answered) % 2] for row in rows]

    with embedding_server(load(folders["mean"]), narrower) as server:
        server.route, server.longest = "/embed", 1 << 20
        with pytest.raises(ValueError, match="answered vectors of 31 and of 32 numbers"):
            check_server(folders["mean"], server.url)


def test_a_server_that_is_not_there_or_has_no_vectors(folders, monkeypatch):
    monkeypatch.setattr(json_server, "WAITS", ())
    with embedding_server(load(folders["mean"])) as server:
        with pytest.raises(OSError, match="gives no vectors by any route.*/v1/embeddings: .* 404: .*`other` does not"):
            check_server(folders["mean"], server.url, "other")
        server.route = "/nowhere"
        with pytest.raises(OSError, match="gives no vectors by any route.*/embed: .* answered 404"):
            check_server(folders["mean"], server.url)
        server.route, server.busy = "/v1/embeddings", 1
        with pytest.raises(OSError, match="answered 503.*overloaded"):
            check_server(folders["mean"], server.url)
        server.names = ["served", "other"]
        with pytest.raises(ValueError, match="has several models: served, other. Name one"):
            check_server(folders["mean"], server.url)
        server.longest = 1 << 20
        assert check_server(folders["mean"], server.url, "served").cosines
        server.names = None  # it does not tell
        assert check_server(folders["mean"], server.url, "served").cosines
    with pytest.raises(OSError, match="does not answer: .*Is it the right address"):
        check_server(folders["mean"], server.url)
    with pytest.raises(ValueError, match="must begin with http"):
        check_server(folders["mean"], "localhost:8000")


def test_the_command(folders, tmp_path, capsys):
    with embedding_server(load(folders["mean"])) as server:
        assert main(["check", folders["mean"], "--url", server.url]) == 0
        said = capsys.readouterr().out
        assert "1.000000 is the least cosine under 'query'." in said and "It refuses long texts" in said
        assert f"The vectors of {server.url} are the model's." in said
    assert main(["check", folders["mean"], "--served-name", "x"]) == 2
    assert "--served-name is of a server" in capsys.readouterr().err
    assert main(["check", folders["mean"], "--prompt", "x"]) == 2
    assert "--prompt is of --vectors" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["check", folders["mean"], "--url", "http://x", "--vectors", "y"])
    SentenceTransformer(folders["mean"]).save_pretrained(str(tmp_path / "saved"))
    assert main(["check", str(tmp_path / "saved"), "--url", "http://127.0.0.1:9"]) == 2
    assert "has no reference.json" in capsys.readouterr().err
