"""What leaves the machine: no token, no path of it, no training text that nobody meant to show."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import save_llm
from hub_server import TOKEN, hub_server, online

from st_llm_embed import build_model
from st_llm_embed.hub import seal
from st_llm_embed.hub.card import without_samples
from st_llm_embed.hub.publishing import _uploaded

TRAINS_AND_PUBLISHES = """
import sys
from st_llm_embed.cli import main
from st_llm_embed.hub import fresh_python
config, model = sys.argv[1:]
with fresh_python():
    assert main(["train", config]) == 0
    assert main(["publish", model, "org/model"]) == 0
    assert main(["publish", model, "org/shown", "--samples"]) == 0
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Iterator[tuple[ThreadingHTTPServer, str, dict[Path, bytes]]]:
    """A Hub with one model twice, without samples and with them; what was printed; the files of the run."""
    root = tmp_path_factory.mktemp("machine-of-somebody")
    base = save_llm(root / "llm-of-somebody")
    (root / "home").mkdir()
    rows = [{"anchor": f"PRIVATE_QUERY_{i} who", "positive": f"PRIVATE_DOCUMENT_{i} what"} for i in range(6)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = {"read": "load_dataset", "path": "json", "data_files": str(root / "rows.jsonl"), "split": "train"}
    arguments = {"use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1}
    private = {"hub_token": "hf_of_an_argument", "hub_model_id": "somebody/secret-project", "run_name": str(root)}
    config = {
        "output": str(root / "run"),
        "model": {"base": base, "recipe": "last-token"},
        "arguments": {**arguments, **private},
        "data": {"pairs": {**read, "instruction": "Find it"}},
        "stages": [{"name": "one", "data": ["pairs"], "arguments": {"learning_rate": 3e-5}}],
    }
    (root / "config.json").write_text(json.dumps(config))
    with hub_server() as server:
        environment = {**os.environ, **online(server, root / "home"), "HOME": str(root / "home")}
        environment |= {"WANDB_API_KEY": "key_of_wandb", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", TRAINS_AND_PUBLISHES, root / "config.json", root / "run" / "1-one" / "model"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        run = {file: file.read_bytes() for file in (root / "run").rglob("*") if file.is_file()}
        yield server, done.stdout + done.stderr, run


def card(published, name: str) -> str:
    return published[0].repositories[name].files["README.md"].decode()


def test_no_secret_is_sent(published):
    server, shown, run = published
    received, repository = server.received, server.repositories["org/model"]
    assert sum(map(len, received)) > 100_000 and "README.md" in repository.files
    secrets = (TOKEN, "hf_of_an_argument", "key_of_wandb", "somebody", "secret-project", "PRIVATE_")
    for secret in secrets:
        lines = [(path, line) for path, content in repository.files.items() for line in content.splitlines()]
        holding = [(path, line[:200]) for path, line in lines if secret.encode() in line]
        assert not holding, (secret, holding)
        if secret != "PRIVATE_":  # which the second one asked for
            assert not any(secret.encode() in content for content in received), secret
    for token in (TOKEN, "hf_of_an_argument", "key_of_wandb"):
        assert token not in shown
        assert not any(token.encode() in content for content in run.values())


def test_the_card_says_how_it_was_trained(published):
    text = card(published, "org/model")
    assert "`learning_rate=3e-05`" in text and "`max_steps=2`" in text and "pairs (6 rows)" in text


def test_samples_are_shown_to_who_asks_for_it(published):
    text = card(published, "org/shown")
    assert "PRIVATE_QUERY_0" in text and "* Samples:" in text


def test_a_card_without_samples_is_whole(published):
    shown, bare = card(published, "org/shown"), card(published, "org/model")
    assert "PRIVATE_" in shown and "widget:" not in bare
    assert without_samples(bare) == bare
    for heading in ("## Usage", "## Training Details", "### Training Dataset", "* Loss:", "similarities"):
        assert heading in bare, heading


def test_what_is_no_part_of_a_model_stays(llm, tmp_path, caplog):
    folder = tmp_path / "model"
    build_model(llm, "mean").save_pretrained(str(folder))
    seal(folder)
    expected = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    others = (".env", "id_rsa", "notes.md", ".git/config", "checkpoint-1/model.safetensors", "trainer_state.json")
    for name in (*others, "1_Pooling/key.pem", "training_args.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "LICENSE.txt").write_text("all rights")
    with caplog.at_level(logging.WARNING):
        assert set(_uploaded(folder)) == expected | {"LICENSE.txt"}
    assert "'id_rsa'" in caplog.text and "'notes.md'" in caplog.text and "1_Pooling" in caplog.text
