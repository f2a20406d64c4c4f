"""The codebase keeps its own rules: imports go one way, shipped files stand alone, importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import st_llm_embed

ROOT = Path(st_llm_embed.__file__).parent
REPOSITORY = ROOT.parent
# Lower layers first; a file imports from its own layer or a lower one. modules import nothing of ours.
LAYERS = [
    {"version", "files", "modules", "heads", "tasks", "data"},
    {"trust", "recipes"},
    {"encoding"},
    {"losses", "weights", "mining", "teaching"},
    {"hub", "model"},
    {"training", "convert", "evaluation", "serving"},
    {"cli"},
    {"__main__", "__init__"},
]


# What shipped files may import: the hosts, and of Python nothing that reaches a network, a shell or a pickle.
SHIPPED_IMPORTS = {
    *(
        "__future__",
        "collections",
        "contextlib",
        "contextvars",
        "copy",
        "functools",
        "importlib",
        "inspect",
        "json",
        "logging",
        "pathlib",
        "re",
        "tempfile",
    ),
    *("shutil", "typing", "warnings", "safetensors", "sentence_transformers", "tokenizers", "torch", "transformers"),
}


def imports(file: Path) -> set[str]:
    """Names of our own packages and files that ``file`` imports, absolutely or by a dot."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == "st_llm_embed":
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("st_llm_embed") for alias in node.names), file
    return found


def test_imports_go_one_way():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    files = sorted(ROOT.rglob("*.py"))
    assert {file.relative_to(ROOT).parts[0].removesuffix(".py") for file in files} == set(level)
    for file in files:
        owner = file.relative_to(ROOT).parts[0].removesuffix(".py")
        for imported in imports(file):
            assert level[imported] <= level[owner], f"{file} imports {imported}"
        if owner == "modules":
            assert imports(file) == set(), file


@pytest.mark.parametrize("file", sorted((ROOT / "modules").glob("[!_]*.py")), ids=lambda file: file.stem)
def test_shipped_files_stand_alone(file):
    source = file.read_text()
    assert "st_llm_embed" not in source and "st-llm-embed" not in source
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            # sentence-transformers follows only "from .sibling import name".
            assert node.level == 0 or (
                node.level == 1 and node.module and (file.parent / f"{node.module}.py").is_file()
            )
            assert node.level or node.module.split(".")[0] in SHIPPED_IMPORTS
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= SHIPPED_IMPORTS
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "open", "compile", "torch.load", "torch.hub.load", "__import__")


HOST_CALLS = {"forward", "preprocess", "save", "load", "gradient_checkpointing_enable", "on_model_ready"}


def test_modules_take_the_hosts_future_keywords():
    """A published model keeps its code, and meets host libraries that pass one argument more."""
    taken = {}
    for file in sorted((ROOT / "modules").glob("*.py")):
        for kind in (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)):
            for method in kind.body:
                if isinstance(method, ast.FunctionDef) and method.name in HOST_CALLS:
                    taken[kind.name, method.name] = method.args.kwarg is not None
    assert len(taken) >= 11 and all(taken.values()), taken


def test_every_file_opens_with_its_idea():
    for file in sorted(ROOT.rglob("*.py")):
        assert ast.get_docstring(ast.parse(file.read_text())), file


def test_importing_only_defines_names():
    script = "import sys, st_llm_embed; print(st_llm_embed.__version__, {'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [st_llm_embed.__version__, "set()"]


def test_the_top_of_the_package_is_short():
    files = [file.name for file in ROOT.glob("*.py") if file.name not in ("__init__.py", "__main__.py")]
    assert len(files) <= 8, files
    assert (ROOT / "py.typed").is_file()


def test_the_top_level_is_what_it_should_be():
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    visible = {Path(line).parts[0] for line in listed.stdout.splitlines()} - {
        ".ci",
        ".gitignore",
        ".github",
        ".pre-commit-config.yaml",
    }
    folders = {"st_llm_embed", "model_cards", "tests", "examples"}
    assert visible == folders | {"pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"}
