"""A corpus to vectors in shards: what ``encode`` gives, the same bytes by any workers, nothing twice, nothing taken
for another's."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util.quantization import quantize_embeddings
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from st_llm_embed import build_model
from st_llm_embed.cli import main
from st_llm_embed.data.sources import joined as title_and_text
from st_llm_embed.encoding import CorpusEncoding, EncodingReport, ModelEncoder
from st_llm_embed.encoding import lease as leases
from st_llm_embed.encoding.encoder import batches
from st_llm_embed.encoding.lease import Piece, complete, lease
from st_llm_embed.encoding.shards import read_vectors
from st_llm_embed.mining.negatives import mine_negatives
from st_llm_embed.tasks import Task
from st_llm_embed.teaching import Teacher

WORDS = [f"word{i}" for i in range(60)]


def static_model(seed: int = 0) -> SentenceTransformer:
    """Random vectors of words, averaged, under prompts."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    prompts = {"query": "word0 word1 ", "document": "word2 "}
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], prompts=prompts, device="cpu")


def texts(number: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(1, 30))) for _ in range(number)]


@pytest.fixture(scope="module")
def corpus() -> Dataset:
    """103 rows: some with titles, three of white space, some twice."""
    rows = texts(103)
    rows[10] = rows[11] = rows[12] = " "
    rows[50:60] = rows[:10]
    titles = [f"word{i % 60}" if i % 3 == 0 and 10 <= i < 50 else "" for i in range(103)]
    return Dataset.from_dict({"_id": [f"d{i}" for i in range(103)], "title": titles, "text": rows})


def joined(corpus: Dataset) -> list[str]:
    return [title_and_text(row["title"], row["text"]) for row in corpus]


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def vectors_of(folder: Path) -> np.ndarray:
    files = [file for file in sorted(folder.iterdir()) if file.stem.isdecimal()]
    return np.concatenate([read_vectors(file) for file in files])


@pytest.mark.parametrize("file_format", ["npy", "parquet"])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_the_vectors_are_those_of_encode(corpus, tmp_path, precision, file_format):
    model = static_model()
    expected = model.encode_document(joined(corpus))
    settings = {"shard_size": 20, "precision": precision, "file_format": file_format}
    CorpusEncoding(ModelEncoder(model), corpus, tmp_path / "vectors", **settings).run()
    found = vectors_of(tmp_path / "vectors")
    if precision in ("float32", "float16"):
        assert found.dtype == precision
        np.testing.assert_allclose(found, expected, atol=1e-6 if precision == "float32" else 1e-3)
    else:
        calibrated = np.stack([expected.min(axis=0), expected.max(axis=0)])
        wanted = quantize_embeddings(expected, precision, ranges=calibrated)
        apart = np.abs(found.astype(int) - wanted.astype(int))
        assert found.dtype == wanted.dtype == np.int8 and (apart <= (1 if precision == "int8" else 0)).all()
    rows = [pq.read_table(file) for file in sorted((tmp_path / "vectors").glob("*.rows.parquet"))]
    assert [name for table in rows for name in table["id"].to_pylist()] == corpus["_id"][:]
    assert [len(table) for table in rows] == [20] * 5 + [3]


def test_an_llm_encodes_as_it_does_alone_under_every_prompt(llm, tmp_path):
    """Cut into batches of tokens, by length; a template around the text too."""
    rows = Dataset.from_dict({"text": [" ".join(["a cat sat"] * (1 + 7 * i % 23)) for i in range(40)]})
    model = build_model(llm, "nv-embed", num_latents=4, num_heads=2, head_dim=8, max_seq_length=40)
    model.prompts |= {"query": "Instruct: Find it\nQuery: ", "quoted": "Say “{text}” again"}
    calls = []
    model[0].register_forward_hook(lambda module, inputs, output: calls.append(output["attention_mask"].shape))
    for side, prompt in (("document", None), ("query", None), ("text", model.prompts["quoted"])):
        encode = getattr(model, {"text": "encode"}.get(side, f"encode_{side}"))
        expected = encode(rows["text"][:], batch_size=1, **({"prompt": prompt} if prompt else {}))
        calls.clear()
        encoder = ModelEncoder(model, side, prompt, tokens_per_batch=100)
        seen = []
        np.testing.assert_allclose(encoder.encode(rows["text"][:], seen.append), expected, atol=1e-5)
        assert sum(seen) == 40 and len(calls) == len(seen) < 30 and all(np.prod(shape) <= 100 for shape in calls)
        report = CorpusEncoding(encoder, rows, tmp_path / side, shard_size=15).run()
        lengths = [
            int(model.preprocess([text], prompt=encoder.prompt)["attention_mask"].sum()) for text in rows["text"]
        ]
        assert report.tokens == sum(lengths) and 0 < report.cut < 40
        np.testing.assert_allclose(vectors_of(tmp_path / side), expected, atol=1e-5)


@pytest.mark.parametrize("flags", [["--dtype", "bfloat16"], pytest.param(["--compile"], marks=pytest.mark.slow)])
def test_the_command_computes_as_it_is_told(llm, tmp_path, flags):
    rows = texts(30, seed=3)
    build_model(llm, "mean", attention="bidirectional").save_pretrained(str(tmp_path / "model"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in rows))
    command = ["encode", str(tmp_path / "model"), str(tmp_path / "rows.jsonl"), "--columns", "text=body", "--output"]
    assert main([*command, str(tmp_path / "plain.npy")]) == 0
    assert main([*command, str(tmp_path / "vectors"), "--shard-size", "20", *flags]) == 0
    plain, told = np.load(tmp_path / "plain.npy"), vectors_of(tmp_path / "vectors")
    apart = float(np.abs(plain - told).max())
    assert (1e-6 < apart < 3e-2) if "--dtype" in flags else apart < 1e-5
    manifest = json.loads((tmp_path / "vectors" / "manifest.json").read_text())
    assert manifest["dtype"] == ("bfloat16" if "--dtype" in flags else "float32") and manifest["rows"] == 30


def test_the_command_refuses_flags_that_do_nothing(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("text\nword1 word2\n")
    command = ["encode", "no-model", str(tmp_path / "rows.csv"), "--output"]
    for output, flags, message in (
        ("v.npy", ["--precision", "int8"], "are of a folder of shards, and --output is a file"),
        ("v.npy", ["--streaming"], "are of a folder of shards"),
        ("v.npz", [], "is no .npy file, and no name of a folder"),
        ("vectors", ["--served-name", "x"], "--served-name is of a server, and there is no --url"),
        ("vectors", ["--url", "http://localhost:1/v1", "--compile"], "--compile is of a model that computes here"),
    ):
        assert main([*command, str(tmp_path / output), *flags]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / output).exists()


def test_batches_hold_so_many_tokens():
    lengths = np.random.default_rng(0).integers(1, 50, 500)
    rows = [batch for batch in batches(lengths, 100)]
    assert sorted(np.concatenate(rows)) == list(range(500))
    assert all(len(batch) * lengths[batch].max() <= 100 for batch in rows)
    assert len(rows) < 1.3 * lengths.sum() / 100  # hardly any padding
    assert [len(batch) for batch in batches(np.array([200, 3]), 100)] == [1, 1]


def test_the_report_says_what_was_encoded(corpus, tmp_path):
    report = CorpusEncoding(ModelEncoder(static_model()), corpus, tmp_path / "vectors", shard_size=20).run()
    own = joined(corpus)
    assert report == EncodingReport(
        texts=103, shards=6, tokens=report.tokens, cut=0, empty=sum(not text.strip() for text in own),
        duplicates=103 - len(set(own)),
    )  # fmt: skip
    assert report.tokens == sum(-(-len(text) // 4) for text in own)
    assert json.loads((tmp_path / "vectors" / "report.json").read_text())["texts"] == 103


class Watched(ModelEncoder):
    """Notes each shard that it begins, takes a while, and knows the file to note it in."""

    log: Path
    pause = 0.0

    def encode(self, texts, done=lambda count: None):
        if len(texts) > 3:  # no reference
            with self.log.open("a") as log:
                log.write(texts[0] + "\n")
            time.sleep(self.pause)
        return super().encode(texts, done)


def forked(work: Callable[[], object]) -> int:
    """The number of a process that does some work. Forked, as an import takes ten seconds."""
    process = os.fork()
    if process:
        return process
    try:
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error))
        os._exit(1)


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.fixture
def single_thread():
    """As a forked process has no threads, and waits for those of its parent."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def many(number: int) -> Dataset:
    return Dataset.from_dict({"text": [f"word{i % 60} {i} word{i % 7}" for i in range(number)]})


def test_workers_share_the_work_and_leave_the_same_bytes(tmp_path, single_thread):
    rows, encoder = many(400), Watched(static_model())
    encoder.log, encoder.pause = tmp_path / "log", 0.02
    CorpusEncoding(encoder, rows, tmp_path / "alone", shard_size=10).run()
    encoder.log.unlink()
    workers = [
        forked(lambda: CorpusEncoding(encoder, rows, tmp_path / "shared", shard_size=10).run()) for _ in range(3)
    ]
    assert [ended(worker) for worker in workers] == [0, 0, 0]
    assert content(tmp_path / "shared") == content(tmp_path / "alone")
    assert len(encoder.log.read_text().splitlines()) == 40  # each once


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_costs_one_shard(tmp_path, single_thread, kills):
    rows, encoder = many(20 * kills), Watched(static_model())
    encoder.log, encoder.pause = tmp_path / "log", 0.03
    CorpusEncoding(encoder, rows, tmp_path / "alone", shard_size=10).run()
    encoder.log.unlink()

    def work() -> object:
        return CorpusEncoding(encoder, rows, tmp_path / "shared", shard_size=10).run()

    draw, killed = random.Random(kills), 0
    workers = {forked(work), forked(work)}
    while killed < kills:
        time.sleep(draw.uniform(0.02, 0.06))
        worker = draw.choice(sorted(workers))
        os.kill(worker, signal.SIGKILL)
        killed += ended(worker) == -signal.SIGKILL
        workers = (workers - {worker}) | {forked(work)}
    assert [ended(worker) for worker in workers] == [0, 0]
    found = content(tmp_path / "shared")
    hidden = {name: found.pop(name) for name in list(found) if name.startswith(".")}
    assert found == content(tmp_path / "alone")
    # Of vectors nothing half-written stays, and no lease.
    assert not list((tmp_path / "shared").rglob(".*/*")) and not [name for name in hidden if "lease" in name]
    assert len(encoder.log.read_text().splitlines()) <= 2 * kills + killed


def test_a_run_goes_on_where_it_was(corpus, tmp_path, caplog):
    encoder = Watched(static_model())
    encoder.log = tmp_path / "log"
    whole = CorpusEncoding(encoder, corpus, tmp_path / "vectors", shard_size=20).run()
    before = content(tmp_path / "vectors")
    (tmp_path / "vectors" / "000003.npy").unlink()
    (tmp_path / "vectors" / "000004.npy").write_bytes(before["000004.npy"][:-5])
    (tmp_path / "vectors" / "000001.rows.parquet").unlink()
    encoder.log.unlink()
    assert CorpusEncoding(encoder, corpus, tmp_path / "vectors", shard_size=20).run() == whole
    assert content(tmp_path / "vectors") == before and len(encoder.log.read_text().splitlines()) == 3
    assert caplog.text.count("was damaged, and is computed again") == 2


def test_a_stream_gives_the_same_shards(corpus, tmp_path):
    encoder = ModelEncoder(static_model())
    for name, precision in (("a", "float32"), ("b", "int8")):
        for rows, place in ((corpus, "whole"), (corpus.to_iterable_dataset(), "stream")):
            settings = {"shard_size": 20, "precision": precision}
            CorpusEncoding(encoder, rows, tmp_path / name / place, **settings).run()
        shards = content(tmp_path / name / "whole"), content(tmp_path / name / "stream")
        assert all(shards[1][file] == data for file, data in shards[0].items() if file != "manifest.json")


def test_mining_and_teaching_read_what_encode_wrote(tmp_path):
    model = static_model()
    rows = Dataset.from_dict({"text": texts(200)})
    CorpusEncoding(ModelEncoder(model), rows, tmp_path / "vectors", shard_size=30, precision="float16").run()
    pairs = Dataset.from_dict({"anchor": texts(20, seed=1), "positive": rows["text"][:20]})
    calls: list[str] = []
    encode = model.encode
    model.encode = lambda inputs, **settings: (calls.extend(inputs), encode(inputs, **settings))[1]
    settings = {"num_negatives": 2, "relative_margin": None}
    mined, *_ = mine_negatives(pairs, model, rows, cache_folder=tmp_path / "vectors", **settings)
    assert not set(calls) & set(rows["text"]) and set(calls) >= set(pairs["anchor"])
    alone, *_ = mine_negatives(pairs, model, rows, **settings)
    assert mined.to_dict() == alone.to_dict()
    calls.clear()
    taught = Teacher(model, tmp_path / "vectors").encode(pairs, Task("find", "Find it"))
    assert not set(calls) & {*pairs["anchor"], *pairs["positive"]}
    expected = model.encode_document(pairs["positive"][:], normalize_embeddings=True)
    np.testing.assert_allclose(taught["positive"].take(np.arange(20)), expected, atol=1e-3)


def test_another_encoding_is_refused_in_the_folder(corpus, tmp_path):
    model = static_model()
    folder = tmp_path / "vectors"
    CorpusEncoding(ModelEncoder(model), corpus, folder, shard_size=20).run()
    before = content(folder)

    def refused(message: str, encoder: ModelEncoder | None = None, rows: Dataset = corpus, **settings) -> None:
        with pytest.raises(ValueError, match=message):
            CorpusEncoding(encoder or ModelEncoder(model), rows, folder, **{"shard_size": 20, **settings}).run()
        assert content(folder) == before

    refused("or of other weights", ModelEncoder(static_model(seed=1)))
    refused("side='document', prompt='word2 '.* side='query', prompt='word0 word1 '", ModelEncoder(model, "query"))
    refused("shard_size=20, and this is 30", shard_size=30)
    refused("precision=float32, and this is int8", precision="int8")
    refused("file_format=npy, and this is parquet", file_format="parquet")
    refused("a corpus of 103 rows, and this one has 102", rows=corpus.select(range(102)))
    other = corpus.to_list()
    other[45]["text"] = "word59"
    refused("another text than the corpus has in row 45", rows=Dataset.from_list(other))
    stream = tmp_path / "stream"
    CorpusEncoding(ModelEncoder(model), corpus.to_iterable_dataset(), stream, shard_size=20).run()
    with pytest.raises(ValueError, match="has 000005.npy, and the corpus only 5 shards"):
        shorter = corpus.select(range(100)).to_iterable_dataset()
        CorpusEncoding(ModelEncoder(model), shorter, stream, shard_size=20).run()


def test_bad_input_is_refused_before_anything_is_encoded(corpus, tmp_path):
    encoder = Watched(static_model())
    encoder.log = tmp_path / "log"

    def refused(message: str, rows: Dataset, **settings) -> None:
        with pytest.raises(ValueError, match=message):
            CorpusEncoding(encoder, rows, tmp_path / "vectors", **settings).run()
        assert not encoder.log.exists()

    rows = corpus.to_list()
    refused("Row 3 of the corpus has no text", Dataset.from_list([*rows[:3], {**rows[3], "text": None}]))
    refused("Row 1 of the corpus has no _id", Dataset.from_list([rows[0], {**rows[1], "_id": None}]))
    refused("Rows 2 and 5 of the corpus have the same id", Dataset.from_list([*rows[:5], rows[2], rows[3]]))
    refused("has the columns .*'words'.* and no 'text'", Dataset.from_dict({"words": ["a"]}))
    refused("shard_size=0", corpus, shard_size=0)
    refused("precision='int4' is unknown. Valid values: float32, float16, int8, binary", corpus, precision="int4")
    refused("file_format='csv' is unknown. Valid values: npy, parquet", corpus, file_format="csv")
    with pytest.raises(ValueError, match="side='passage' is unknown. Valid values: query, document, text"):
        ModelEncoder(encoder.model, "passage")
    with pytest.raises(ValueError, match="tokens_per_batch=0"):
        ModelEncoder(encoder.model, tokens_per_batch=0)
    with torch.no_grad():
        encoder.model[0].embedding.weight[40] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity for 'word39"):
        CorpusEncoding(encoder, Dataset.from_dict({"text": ["word3", "word39 word4"]}), tmp_path / "nan").run()
    assert not list((tmp_path / "nan").glob("0*"))


def test_a_full_disk_loses_nothing(tmp_path, single_thread):
    rows, encoder = many(300), ModelEncoder(static_model())

    def work() -> object:
        return CorpusEncoding(encoder, rows, tmp_path / "vectors", shard_size=100, file_format="npy").run()

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))  # less than a shard
        with pytest.raises(OSError, match="File too large"):
            work()

    assert ended(forked(limited)) == 0
    assert not list((tmp_path / "vectors").glob("0*.npy")) and not list((tmp_path / "vectors").glob(".0*"))
    assert work().texts == 300


def test_a_lease_is_kept_and_taken_over(tmp_path, monkeypatch):
    file = tmp_path / "piece"
    with lease(file) as ours:
        assert ours
        with lease(file) as theirs:
            assert not theirs
    with lease(file) as ours:
        assert ours
        note = tmp_path / ".piece.lease"
        note.write_text("elsewhere\n1")  # taken over by another machine meanwhile, which keeps it
    assert note.read_text() == "elsewhere\n1"
    with lease(file) as ours:
        assert not ours
    os.utime(note, (time.time() - 61,) * 2)
    with lease(file) as ours:
        assert ours
    assert not note.exists()
    # One that works on touches it.
    monkeypatch.setattr(leases, "EXPIRES", 0.3)
    with lease(file) as ours:
        note.rename(tmp_path / "aside")
        (tmp_path / "aside").rename(note)
        time.sleep(0.5)
        with lease(file) as theirs:
            assert ours and not theirs
    assert [path.name for path in tmp_path.iterdir()] == []


def test_complete_waits_for_others_and_says_what_was_done_here(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "POLL", 0.01)
    files = [tmp_path / name for name in "abc"]
    pieces = [Piece(file, file.exists, file.touch) for file in files]
    (tmp_path / ".b.lease").write_text("elsewhere\n1")
    assert complete(lambda: pieces, wait=False) == 2 and not files[1].exists()
    looks = count()

    def others_work() -> list[Piece]:
        if next(looks) == 3:
            files[1].touch()
            (tmp_path / ".b.lease").unlink()
        return pieces

    assert complete(others_work) == 0 and next(looks) == 4
