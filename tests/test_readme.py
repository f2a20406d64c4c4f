"""Everything the README tells a user to run, runs: against a local Hub, with tiny models under the names it uses."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_llm
from hub_server import hub_server, online

from st_llm_embed import build_model
from st_llm_embed.cli import main
from st_llm_embed.hub import save_sealed

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LOAD_FROM_HUB = """
import sys
sys.modules["st_llm_embed"] = None
from sentence_transformers import SentenceTransformer
print(SentenceTransformer("your-org/your-new-model", trust_remote_code=True).encode("a cat").shape)
"""


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found
    return found


def run(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_the_python_blocks_run_in_order_and_what_they_publish_loads(tmp_path):
    save_llm(tmp_path / "HuggingFaceTB" / "SmolLM2-135M")
    save_sealed(build_model(tmp_path / "HuggingFaceTB" / "SmolLM2-135M"), tmp_path / "your-org" / "your-model")
    with hub_server() as hub:
        done = run("\n".join(blocks("python")), tmp_path, **online(hub, tmp_path / "hf"))
        assert done.returncode == 0, done.stderr[-3000:]
        assert re.search(r"tensor\(\[\[.*,.*\]\]\)", done.stdout)
        assert (tmp_path / "my-model" / "modules.json").is_file()
        assert "names no licence" in done.stderr and "set_license('apache-2.0')" in done.stderr
        published = hub.repositories["your-org/your-new-model"]
        assert published.private and "llm_backbone.py" in published.files
        snippet = b'SentenceTransformer("your-org/your-new-model", trust_remote_code=True)'
        assert snippet in published.files["README.md"]
        loaded = run(LOAD_FROM_HUB, tmp_path, **online(hub, tmp_path / "empty-cache"))
        assert loaded.stdout.strip() == "(32,)", loaded.stderr[-3000:]


def test_the_commands_exist():
    for command in "\n".join(blocks("bash")).splitlines():
        words = shlex.split(command, comments=True)
        assert words[0] == "bash" and (ROOT / words[1]).is_file(), command
        subprocess.run(["bash", "-n", ROOT / words[1]], check=True)


def test_the_tree_names_every_file():
    (tree,) = re.findall(r"^```\n(st_llm_embed/.*?)^```", README, re.MULTILINE | re.DOTALL)
    for path in (ROOT / "st_llm_embed").rglob("*.py"):
        if path.stem not in ("__init__", "__main__", "version") and path.parent.name not in ("data", "losses"):
            assert path.name in tree, path


def test_the_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "architectures",
        "convert",
        "average",
        "train",
        "merge",
        "export",
        "mine",
        "check",
        "publish",
        "evaluate",
    ],
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert len(capsys.readouterr().out) > 200
