"""What hands out the work changes nothing, and what takes the vectors finds what brute force finds."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from st_llm_embed.data import load_corpus
from st_llm_embed.encoding import CorpusEncoding, ModelEncoder, read_shards

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
WORDS = [f"word{i}" for i in range(60)]
ROWS = 103


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A model and a corpus under the scripts' names; the model has random vectors of words, averaged, and prompts."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    prompts = {"query": "word0 word1 ", "document": "word2 "}
    modules = [StaticEmbedding(tokenizer, embedding_dim=16)]
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(folder / "my-model"))
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 30))) for _ in range(ROWS)]
    rows = [json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture
def here(files, tmp_path, monkeypatch) -> Path:
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def encoding(here: Path, folder: str, corpus: Dataset | IterableDataset | None = None, **settings) -> CorpusEncoding:
    model = SentenceTransformer(str(here / "my-model"), device="cpu")
    encoder = ModelEncoder(model, "document", name=str(here / "my-model"))
    source = str(here / "corpus.jsonl")
    corpus = load_corpus(source) if corpus is None else corpus
    return CorpusEncoding(encoder, corpus, here / folder, source=source, **settings)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PYTHONPATH": path, "PATH": programs, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_workers_of_ray_leave_the_same_bytes(here):
    pytest.importorskip("ray.data", reason="ray is not installed: pip install 'st-llm-embed[scale]'")
    script = (EXAMPLES / "ray_encode.py").read_text()
    small = script.replace("SHARD_SIZE = 10_000", "SHARD_SIZE = 10").replace("WORKERS = 1, 8", "WORKERS = 1, 2")
    small = small.replace("import ray\n", "import ray\n\nray.init(num_cpus=2, include_dashboard=False)\n")
    assert script.count("= 10_000") == script.count("WORKERS = 1, 8") == script.count("import ray\n") == 1
    (here / "ray_encode.py").write_text(small)
    with tempfile.TemporaryDirectory(dir="/tmp") as ray:  # whose sockets must have short names
        quiet = {"RAY_TMPDIR": ray, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        command = [sys.executable, "ray_encode.py"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment() | quiet, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "11 of 11 shards were encoded now" in done.stdout and f"texts={ROWS}" in done.stdout
    encoding(here, "alone", shard_size=10).run()
    assert content(here / "vectors") == content(here / "alone")


def test_a_shard_that_is_handed_out_is_there_on_return(here, monkeypatch):
    """Also where whoever had begun it is gone, and its lease is not over."""
    monkeypatch.setattr("st_llm_embed.encoding.lease.EXPIRES", 1.0)
    monkeypatch.setattr("st_llm_embed.encoding.lease.POLL", 0.05)
    ours = encoding(here, "vectors", shard_size=50)
    (here / "vectors" / ".000001.npy.lease").write_text("another machine\n1")
    assert [ours.encode_shard(number) for number in (1, 0, 1, 2)] == [True, True, False, True]
    assert ours.report().texts == ROWS


@pytest.mark.slow
def test_tasks_of_slurm_share_a_folder(here):
    """Two tasks of a job array, on machines of two GPUs each, as far as one without SLURM and GPUs can be two."""
    script = EXAMPLES / "slurm_encode.sh"
    subprocess.run(["bash", "-n", script], check=True)
    given = ["my-model", "corpus.jsonl", "vectors", "--shard-size", "5"]
    tasks = [
        subprocess.Popen(
            ["bash", script, *given],
            env=environment() | {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_GPUS_ON_NODE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for task in (1, 2)
    ]
    said = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert [text.count(f"vectors has {ROWS} texts in 21 shards") for text in said] == [2, 2]
    assert len(list((here / "vectors").glob("*.npy"))) == 21 and not list((here / "vectors").glob(".*"))
    alone = [sys.executable, "-m", "st_llm_embed", "encode", "my-model", "corpus.jsonl", "--output", "alone"]
    subprocess.run([*alone, "--shard-size", "5"], check=True, capture_output=True, env=environment())
    assert content(here / "vectors") == content(here / "alone")
    refused = subprocess.run(["bash", script, "my-model"], capture_output=True, text=True)
    assert refused.returncode == 2 and "Usage: sbatch" in refused.stderr


@pytest.mark.parametrize("file_format", ["npy", "parquet"])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_shards_are_read_in_the_order_of_the_corpus(here, precision, file_format):
    settings = {"precision": precision, "file_format": file_format}
    encoding(here, "vectors", shard_size=20, **settings).run()
    encoding(here, "whole", **settings).run()
    shards = list(read_shards(here / "vectors"))
    assert [len(ids) for ids, _ in shards] == [len(vectors) for _, vectors in shards] == [20, 20, 20, 20, 20, 3]
    assert sum((ids for ids, _ in shards), []) == [f"d{i}" for i in range(ROWS)]
    found = np.concatenate([vectors for _, vectors in shards])
    ((_, whole),) = read_shards(str(here / "whole"))
    np.testing.assert_array_equal(found, whole)
    dtype = {"float32": "float32", "float16": "float16", "int8": "int8", "binary": "int8"}[precision]
    assert found.dtype == dtype and found.shape == (ROWS, 2 if precision == "binary" else 16)
    texts = load_corpus("corpus.jsonl")["text"]
    exact = SentenceTransformer("my-model", device="cpu").encode_document(list(texts))
    if precision == "binary":
        signs = np.unpackbits((found.astype(np.int16) + 128).astype(np.uint8), axis=1)
        np.testing.assert_array_equal(signs, exact > 0)
    elif precision != "int8":
        np.testing.assert_allclose(found, exact, atol=1e-6 if precision == "float32" else 2e-3)


def test_a_folder_that_is_not_whole_is_refused_before_it_is_read(here):
    folder = here / "vectors"
    ours = encoding(here, "vectors", shard_size=20)
    for number in (0, 1, 3, 5):
        ours.encode_shard(number)
    with pytest.raises(ValueError, match=r"lacks 2 of 6 shards, such as 000002.npy.*Run the same encode command"):
        read_shards(folder)
    ours.run()
    last = folder / "000005.npy"
    whole = last.read_bytes()
    last.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="lacks 1 of 6 shards, such as 000005.npy, or they are damaged"):
        read_shards(folder)
    last.write_bytes(whole)
    assert len(list(read_shards(folder))) == 6
    (folder / "000004.rows.parquet").unlink()
    with pytest.raises(ValueError, match="such as 000004.npy"):
        read_shards(folder)
    for other in (here, here / "nowhere"):
        with pytest.raises(ValueError, match="has no manifest.json of a whole corpus"):
            read_shards(other)


def test_a_stream_is_whole_when_it_has_a_report(here):
    stream = load_corpus("corpus.jsonl", streaming=True)
    encoding(here, "vectors", stream, shard_size=20).run()
    assert sum(len(ids) for ids, _ in read_shards(here / "vectors")) == ROWS
    (here / "vectors" / "report.json").unlink()
    with pytest.raises(ValueError, match="has no report.json.*may not have been encoded to its end"):
        read_shards(here / "vectors")


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("package, script", [("lancedb", "to_lancedb"), ("qdrant_client", "to_qdrant")])
def test_a_store_finds_what_brute_force_finds(here, package, script, precision, capsys):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'st-llm-embed[scale]'")
    encoding(here, "vectors", shard_size=20, precision=precision).run()
    model = SentenceTransformer("my-model", device="cpu")
    documents = model.encode_document(list(load_corpus("corpus.jsonl")["text"]), normalize_embeddings=True)
    scores = documents @ model.encode_query("how do I send a mail?", normalize_embeddings=True)
    best = np.argsort(-scores, kind="stable")[:3]
    for _ in range(2):  # the second time in the place of what is there
        runpy.run_path(str(EXAMPLES / f"{script}.py"))
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith(f"{ROWS} documents are in ") and said[1] == "how do I send a mail?"
        found = [line.split() for line in said[2:]]
        assert [name for _, name in found] == [f"d{row}" for row in best]
        np.testing.assert_allclose([float(score) for score, _ in found], scores[best], atol=2e-3)
