"""Where results go is tried before the work, and nothing that was written is lost at its end."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.architectures.survey import main as run_survey
from examples.demo.demo import run_demo
from st_llm_embed import build_model
from st_llm_embed.cli import main
from st_llm_embed.convert import convert_llara, convert_nv_embed
from st_llm_embed.evaluation import evaluate
from st_llm_embed.files import check_empty, find_damaged, written_beside
from st_llm_embed.hub import save_sealed
from st_llm_embed.training import train_stages
from st_llm_embed.weights.averaging import average_checkpoints
from st_llm_embed.weights.export import export_causal_lm

ABSENT = "no-such/model"
STAGES = {"model": {"base": ABSENT}, "data": {"d": {"read": "from_beir", "folder": ABSENT}}}
STAGES |= {"stages": [{"name": "one", "data": ["d"]}]}
WRITERS = {
    "average": lambda out: average_checkpoints([ABSENT, ABSENT], out),
    "convert_llara": lambda out: convert_llara(ABSENT, out),
    "convert_nv_embed": lambda out: convert_nv_embed(ABSENT, out),
    "demo": lambda out: run_demo(out, ABSENT),
    "evaluate": lambda out: evaluate(ABSENT, [ABSENT], out),
    "export": lambda out: export_causal_lm(None, ABSENT, out),
    "save_sealed": lambda out: save_sealed(None, out),
    "train": lambda out: train_stages({**STAGES, "output": str(out)}),
}
COMMANDS = {
    "average": [ABSENT, ABSENT, "--output", "{out}"],
    "convert": [ABSENT, "{out}"],
    "evaluate": [ABSENT, "--tasks", ABSENT, "--output", "{out}"],
    "export": [ABSENT, ABSENT, "{out}"],
    "merge": [ABSENT, "{out}"],
    "mine": [ABSENT, ABSENT, "--output", "{out}"],
    "parity": [ABSENT, "--tasks", ABSENT, "--parity", "--output", "{out}"],
}


def impossible(folder: Path) -> dict[str, Path]:
    (folder / "file").write_text("mine")
    return {"below a file": folder / "file" / "out", "a long name": folder / ("x" * 300), "a file": folder / "file"}


@pytest.mark.parametrize("where", ["below a file", "a long name", "a file"])
@pytest.mark.parametrize("writer", WRITERS)
def test_the_place_is_tried_before_the_work(tmp_path, writer, where):
    """Of the place, and not of the inputs, which are not there either."""
    with pytest.raises(OSError, match="cannot be written: (Not a directory|File name too long|it exists)"):
        WRITERS[writer](impossible(tmp_path)[where])
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_try_the_place_before_they_load_anything(tmp_path, capsys, command):
    out = str(impossible(tmp_path)["below a file"])
    name = "evaluate" if command == "parity" else command
    assert main([name, *(argument.format(out=out) for argument in COMMANDS[command])]) == 2
    assert f"{out} cannot be written: Not a directory. Choose another place" in capsys.readouterr().err


def test_the_survey_tries_the_place_before_it_measures(tmp_path):
    with pytest.raises(OSError, match="out cannot be written: Not a directory. Choose another place"):
        run_survey(["llama", "--output", str(impossible(tmp_path)["below a file"])])


def test_a_table_goes_into_new_folders_and_over_the_last_one(tmp_path, capsys):
    file = tmp_path / "new" / "table.md"
    for _ in range(2):
        run_survey(["llama", "--output", str(file)])
        assert file.read_text() + "\n" == capsys.readouterr().out
    with pytest.raises(IsADirectoryError, match="is a folder. Name a file"):
        run_survey(["llama", "--output", str(tmp_path)])


def forked(act: Callable[[], object]) -> str:
    """The error of ``act`` in a child process, which may change its user and its mounts."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        error = ""
        try:
            act()
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
        os.write(writer, error.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        return pipe.read().decode()


def mounted(act: Callable[[], object], *mount: str | Path) -> str:
    """``forked``, after a mount that no other process sees."""

    def mount_first() -> None:
        assert ctypes.CDLL(None).unshare(0x00020000) == 0  # CLONE_NEWNS
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", *mount], check=True)
        act()

    return forked(mount_first)


def write(target: Path) -> None:
    check_empty(target)
    with written_beside(target) as staged:
        (staged / "1_Pooling").mkdir(parents=True)
        (staged / "modules.json").write_text("[]")
    assert sorted(path.name for path in target.iterdir()) == ["1_Pooling", "modules.json"]


AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root may mount and become another user")


@AS_ROOT
def test_a_folder_in_a_parent_that_is_not_ours_is_written_into(tmp_path):
    locked = tmp_path / "locked"
    (locked / "out").mkdir(parents=True)
    (locked / "out").chmod(0o777)
    for folder in (locked, tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o055 != 0o055:  # pytest's own are root's alone
            folder.chmod(0o755)

    def as_nobody(target: Path) -> None:
        os.setuid(65534)
        write(target)

    assert forked(lambda: as_nobody(locked / "out")) == ""
    refused = forked(lambda: as_nobody(locked / "other"))
    assert refused == f"PermissionError: {locked}/other cannot be written: Permission denied. Choose another place."


@AS_ROOT
def test_a_mount_point_is_written_into(tmp_path):
    """A file system of its own, and a folder of the same one: onto neither can a folder be renamed."""
    for name in ("source", "out"):
        (tmp_path / name).mkdir()
    assert mounted(lambda: write(tmp_path / "out"), "-t", "tmpfs", "none", tmp_path / "out") == ""
    assert mounted(lambda: write(tmp_path / "out"), "--bind", tmp_path / "source", tmp_path / "out") == ""
    read_only = mounted(lambda: write(tmp_path / "out" / "new"), "-t", "tmpfs", "-o", "ro", "none", tmp_path / "out")
    assert "out/new cannot be written: Read-only file system. Choose another place." in read_only


@AS_ROOT
def test_a_disk_without_room_is_refused_before_the_work(llm, tmp_path):
    """On a file system of 100 kB; the model needs more."""
    model, small = build_model(llm, "last-token"), tmp_path / "small"
    small.mkdir()
    writers = {
        "save_sealed": lambda: save_sealed(model, small / "new" / "out"),
        "export": lambda: export_causal_lm(model, ABSENT, small / "out"),
        "full": lambda: ((small / "all").write_bytes(bytes(100 * 1024)), check_empty(small / "out")),
    }
    for name, write_there in writers.items():
        error = mounted(write_there, "-t", "tmpfs", "-o", "size=100k", "none", small)
        assert ("No space left on device" if name == "full" else "has 0 MB free") in error, name


def test_a_folder_that_is_there_stays_the_same_one(tmp_path):
    """Its owner, rights and mounts too, and a shell that stands in it."""
    (tmp_path / "out").mkdir(mode=0o711)
    before = (tmp_path / "out").stat()
    with written_beside(tmp_path / "out") as staged:
        staged.mkdir()
        (staged / "a").write_text("1")
    after = (tmp_path / "out").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a"]
    with pytest.raises(KeyError), written_beside(tmp_path / "out") as staged:
        raise KeyError
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a"]


def test_what_cannot_be_put_in_place_is_kept(tmp_path):
    """Somebody else wrote to the same place meanwhile."""
    with pytest.raises(OSError, match="out could not be put in place: .* Nothing is lost") as refused:
        with written_beside(tmp_path / "out") as staged:
            staged.mkdir()
            (staged / "a").write_text("1")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()
    assert str(staged) in str(refused.value) and (staged / "a").read_text() == "1"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["theirs"]


def test_damaged_files_are_found(llm, tmp_path):
    folder = tmp_path / "model"
    build_model(llm, "nv-embed", num_latents=4).save_pretrained(str(folder))
    torch.save({"a": torch.ones(3)}, folder / "optimizer.pt")
    assert find_damaged(folder) == []
    weights, pooled = folder / "model.safetensors", folder / "1_LatentAttentionPooling" / "model.safetensors"
    for file in (weights, pooled, folder / "optimizer.pt", folder / "modules.json"):
        whole = file.read_bytes()
        for cut in (b"", whole[: len(whole) // 2], bytes(len(whole))):
            file.write_bytes(cut)
            assert find_damaged(folder) == [str(file)], (file, len(cut))
        file.write_bytes(whole)
    save_file({"a": torch.ones(1)}, folder / "model-00001-of-00002.safetensors")
    shards = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(shards)
    assert find_damaged(folder) == [str(folder / "model-00002-of-00002.safetensors")]
