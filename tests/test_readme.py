"""What README and guides tell a user to run, runs or is there, and the figures that they show are measured ones."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import save_llm
from hub_server import hub_server, online

from examples.study import shorter
from examples.study.curve import read_points, table
from examples.study.report import summarize
from examples.study.run import file_name
from st_llm_embed.cli import COMMANDS, main, parser
from st_llm_embed.files import read_json
from st_llm_embed.recipes import RECIPES
from st_llm_embed.training.configuration import Given
from st_llm_embed.training.keys import json_schema, reference
from st_llm_embed.training.run_config import read_run

ROOT = Path(__file__).parents[1]
SHORTER = ("mean, distilled", "mean, distilled, Matryoshka")  # the study's rows in the table of shorter vectors
README = (ROOT / "README.md").read_text()
GUIDES = sorted(
    [ROOT / "README.md", *(ROOT / ".github").glob("*.md")]
    + [file for folder in ("st_llm_embed", "examples") for file in (ROOT / folder).rglob("README.md")]
)
LOAD_FROM_HUB = """
import sys
sys.modules["st_llm_embed"] = None
from sentence_transformers import SentenceTransformer
print(SentenceTransformer("your-org/your-model", trust_remote_code=True).encode("a cat").shape)
"""


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


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
    rows = [f"how do I do {i}?,do{i} does it,do{i + 1} does another" for i in range(8)]
    (tmp_path / "pairs.csv").write_text("\n".join(["anchor,positive,negative_1", *rows]) + "\n")
    with hub_server() as hub:
        done = run("\n".join(blocks("python")), tmp_path, **online(hub, tmp_path / "hf"))
        assert done.returncode == 0, done.stderr[-3000:]
        assert re.search(r"tensor\(\[\[.*,.*\]\]\)", done.stdout)
        assert (tmp_path / "my-model" / "modules.json").is_file()
        assert "names no licence" in done.stderr and "set_license('apache-2.0')" in done.stderr
        published = hub.repositories["your-org/your-model"]
        assert published.private and "llm_backbone.py" in published.files
        snippet = b'SentenceTransformer("your-org/your-model", trust_remote_code=True)'
        assert snippet in published.files["README.md"]
        loaded = run(LOAD_FROM_HUB, tmp_path, **online(hub, tmp_path / "empty-cache"))
        assert loaded.stdout.strip() == "(32,)", loaded.stderr[-3000:]


def test_the_readme_is_short():
    assert len(README.encode()) < 9_000 and len(README.splitlines()) < 170


@pytest.mark.parametrize("guide", GUIDES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_block_has_its_language_and_says_what_there_is(guide):
    """Scripts are there, commands and their options too, and so is what Python imports."""
    text = guide.read_text()
    fences = re.findall(r"^```(.*)$", text, re.MULTILINE)
    assert len(fences) % 2 == 0 and {*fences[::2]} <= {"bash", "python", "yaml", "text"} and not any(fences[1::2])
    for line in "\n".join(blocks("bash", text)).replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        for command in " ".join(words).split(" && "):
            check_command(shlex.split(command) if " && " in line else words)
    for block in blocks("python", text):
        imports = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), str(guide), "exec"), {})


def check_command(words: list[str]) -> None:
    if not words:
        return
    if words[0] in ("bash", "sbatch"):
        assert (ROOT / words[1]).is_file(), words
        subprocess.run(["bash", "-n", ROOT / words[1]], check=True)
    elif words[0] == "st-llm-embed":
        parser().parse_args(words[1:])
    elif words[0] in ("accelerate", "torchrun"):
        start = words.index("st_llm_embed")
        assert words[start - 1] == "-m"
        parser().parse_args(words[start + 1 :])
        for name in (word for word in words if word.endswith(".yaml") and "/" in word):
            assert (ROOT / name).is_file(), name
    elif words[:2] == ["python", "-m"] and words[2].startswith("examples."):
        path = ROOT / words[2].replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file() or "NAME" in words[2], words
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), words
    elif words[:2] == ["pip", "install"]:
        extras = tomllib_extras()
        for word in words[2:]:
            asked = re.match(r"(?:\.|st-llm-embed)\[(.*)\]", word)
            assert asked is None or set(asked[1].split(",")) <= extras, word
    else:
        assert words[0] in ("git", "pre-commit", "cd", "vllm", ".venv/bin/python", "HOSTS=lowest", "HOSTS=newest"), (
            words
        )


def tomllib_extras() -> set[str]:
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = ", section, re.MULTILINE))


def test_the_configuration_of_the_training_guide_is_one():
    block, *others = blocks("yaml", (ROOT / "st_llm_embed" / "training" / "README.md").read_text())
    assert all(read_run(Given(yaml.safe_load(other))) for other in others) and len(others) == 3
    config = read_run(Given(yaml.safe_load(block)))
    assert [stage.name for stage in config.stages] == ["pretext", "retrieval", "blended"] and len(config.data) == 4


def test_the_configuration_of_the_teaching_guide_is_one():
    (block,) = blocks("yaml", (ROOT / "st_llm_embed" / "teaching" / "README.md").read_text())
    config = read_run(Given(yaml.safe_load(block)))
    assert config.stages[0].teach.teacher == "your-org/teacher" and len(config.data) == 3


def test_the_reference_of_all_keys_is_what_checks_them():
    assert (ROOT / "st_llm_embed" / "training" / "KEYS.md").read_text() == reference()
    schema = json_schema()

    def keys(part: dict) -> set[str]:
        part = schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        inner = [*part.get("anyOf", ()), *part.get("oneOf", ()), *(part[key] for key in ("items",) if key in part)]
        inner += [of for of in (part.get("additionalProperties"),) if isinstance(of, dict)]
        own = part.get("properties", {})
        return set(own).union(*map(keys, own.values()), *map(keys, inner))

    parts = [schema["$defs"][branch["$ref"].rpartition("/")[2]] for branch in schema["properties"]["model"]["oneOf"]]
    recipes = [part["properties"].get("recipe", {}).get("const") for part in parts]  # by which editors tell them apart
    assert recipes == [*RECIPES, None] and ["recipe" in part["required"] for part in parts[:2]] == [False, True]
    said = {
        "learning_rate",
        "lora_alpha",
        "num_latents",
        "load",
        "instruction",
        "columns",
        "teacher",
        "matryoshka_dims",
    }
    assert said | {"lm_head", "eval_tasks", "spread_weight", "license", "document_prompt", "hub_model_id"} <= keys(
        schema
    )


@pytest.mark.parametrize("guide", GUIDES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_links_lead_somewhere(guide):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", guide.read_text()):
        assert (guide.parent / target.replace("\n", "").partition("#")[0]).exists(), target


def test_the_tree_names_every_file():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    for path in (ROOT / "st_llm_embed").rglob("*.py"):
        if path.stem not in ("__init__", "__main__", "version") and path.parent.name not in ("data", "cli"):
            assert path.name in text, path


def test_the_tables_of_results_are_those_of_the_result_files():
    """Of the study's README and reports in full; of the README to the digit."""
    guide = (ROOT / "examples" / "study" / "README.md").read_text()
    results = ROOT / "examples" / "study" / "results"
    taught = ["taught", "taught-hour", "taught-long", "taught-longest", "taught-all", "taught-double"]
    assert f"<!-- table: curve -->\n{table(read_points([results / size for size in taught]))}<!-- end -->" in guide
    kept = {name: read_json(results / "taught" / "shorter" / f"{file_name(name)}.json") for name in SHORTER}
    assert f"<!-- table: shorter -->\n{shorter.table(kept)}<!-- end -->" in guide
    for size in ("cpu", "taught", "taught-hour", "taught-long", "taught-all", "pairs", "cpu-long"):
        folder = results / size
        summary, every = summarize(folder)
        assert f"<!-- table: {size} -->\n{summary}<!-- end -->" in guide
        assert (folder / "report.md").read_text() == f"# The study\n\n{summary}\n## Every test set\n\n{every}"
    rows = {line.split(" | ")[0]: line.split(" | ") for line in summary.splitlines()}
    shown = README.partition("<!-- results: cpu-long -->\n")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(shown) == 5
    for line in shown:
        cells = line.split(" | ")
        whole = rows[cells[0]]
        assert cells[1:] == [whole[2], whole[3], f"{whole[8]} |"], line


def test_the_wheel_has_what_the_package_reads_and_no_examples(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "st_llm_embed", source / "st_llm_embed", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = ROOT / "st_llm_embed"
    needed = {file.relative_to(ROOT).as_posix() for file in package.rglob("*.py")}
    needed |= {
        f"st_llm_embed/{name}"
        for name in ("py.typed", "tasks.json", "hub/model_card_template.md", "training/README.md")
    }
    assert needed <= names and {name.split("/")[0] for name in names} == {"st_llm_embed", wheel_info(names)}


def wheel_info(names: set[str]) -> str:
    return next(name.split("/")[0] for name in names if name.endswith("/METADATA"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit):
        main([command.__name__.rpartition(".")[2].replace("_", "-"), "--help"])
    assert len(capsys.readouterr().out) > 200
