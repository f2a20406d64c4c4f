"""The documentation inside the installed Python as a data set: real English and code, on every machine, offline.

Each documented module, class and function of the standard library is one entry. Entries are split by module, so that
what is evaluated was never trained on:

- retrieval: an entry's summary line asks for the rest of it, its signature and body; another entry of the same module
  is the hard negative;
- classification: entries of the same package belong together; entries of other packages are the negatives;
- pretext: consecutive paragraphs of one docstring.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

# Test suites, vendored wheels, and the editor and demos that are programs, not a library.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "ensurepip"}
SKIPPED |= {"turtledemo", "idlelib"}
MAX_DOCUMENT_CHARACTERS = 600  # about 150 tokens; longer bodies are cut


@dataclass(frozen=True)
class Entry:
    """One documented object."""

    name: str  # "argparse.ArgumentParser.parse_args"
    package: str  # "argparse": the first part of the module's name
    module: str
    summary: str  # the docstring's first line
    docstring: str
    document: str  # signature, the docstring without its summary, and body


@dataclass(frozen=True)
class StandardLibrary:
    """All entries, those of held-back modules apart."""

    train: list[Entry]
    test: list[Entry]

    def pretext_documents(self) -> list[str]:
        return [entry.docstring for entry in self.train]

    def retrieval(self, seed: int = 0) -> Dataset:
        """Columns ``anchor`` (summary), ``positive`` (document), ``negative`` (another document of the module)."""
        choose = random.Random(seed)
        rows = []
        for siblings in _grouped(self.train, "module").values():
            for entry in siblings:
                others = [e for e in siblings if e.document != entry.document and e.summary != entry.summary]
                if others:
                    rows.append((entry.summary, entry.document, choose.choice(others).document))
        return _shuffled(rows, ["anchor", "positive", "negative"], choose)

    def classification(self, negatives: int = 2, seed: int = 0) -> Dataset:
        """Columns ``anchor``, ``positive`` (docstrings of one package), ``negative_1..n`` (of other packages)."""
        choose = random.Random(seed)
        packages = {name: entries for name, entries in _grouped(self.train, "package").items() if len(entries) > 1}
        rows = []
        for name, entries in packages.items():
            others = [other for other in packages if other != name]
            for entry in entries:
                positive = choose.choice([e for e in entries if e is not entry])
                if positive.docstring == entry.docstring or len(others) < negatives:
                    continue
                wrong = [choose.choice(packages[other]).docstring for other in choose.sample(others, negatives)]
                texts = [entry.docstring, positive.docstring, *wrong]
                rows.append(tuple(" ".join(text.split())[:MAX_DOCUMENT_CHARACTERS] for text in texts))
        columns = ["anchor", "positive", *(f"negative_{i + 1}" for i in range(negatives))]
        return _shuffled(rows, columns, choose)

    def evaluation(self) -> tuple[dict[str, str], dict[str, str], dict[str, set[str]]]:
        """Held-back queries (by id), corpus (by id) and the relevant ids of each query.

        A summary that several entries share would have no single answer, so it is not asked.
        """
        documents = {entry.name: entry.document for entry in self.test}
        by_summary = _grouped(self.test, "summary")
        queries = {entries[0].name: summary for summary, entries in by_summary.items() if len(entries) == 1}
        return queries, documents, {name: {name} for name in queries}


def load_standard_library(limit: int | None = None) -> StandardLibrary:
    """Read the installed Python's documentation (without importing any of it).

    Args:
        limit: at most this many entries, spread over the modules, for a quick run.
    """
    root = Path(sysconfig.get_path("stdlib"))
    entries = {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if not SKIPPED.intersection(path.parts) and not any(p.startswith("test_") for p in path.parts):
            # Some modules repeat others word for word: each text once, or what is held back would be trained on.
            entries.update((entry.document, entry) for entry in _read_module(file, path))
    # A module is held back by the hash of its name: the same ones on every machine and Python.
    chosen = sorted(entries.values(), key=lambda e: hashlib.sha256(e.name.encode()).hexdigest())[:limit]
    held_back = {e.module for e in chosen if hashlib.sha256(e.module.encode()).digest()[0] < 0.07 * 256}
    return StandardLibrary(
        train=[e for e in chosen if e.module not in held_back], test=[e for e in chosen if e.module in held_back]
    )


def _read_module(file: Path, path: Path) -> Iterator[Entry]:
    source = file.read_text(encoding="utf-8", errors="replace")
    try:
        tree = ast.parse(source)
    except SyntaxError:  # templates and deliberately broken files
        return
    lines = source.splitlines()
    parts = list(path.with_suffix("").parts)
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    yield from _read_node(tree, module, module, lines)


def _read_node(node: ast.AST, name: str, module: str, lines: list[str]) -> Iterator[Entry]:
    documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    if documented and (docstring := ast.get_docstring(node)):
        summary, _, rest = docstring.strip().partition("\n")
        text = node.body[0]
        head = "" if isinstance(node, ast.Module) else "\n".join(lines[node.lineno - 1 : text.lineno - 1])
        # A module's or class's body is its members, which are entries of their own.
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        body = "\n".join(lines[text.end_lineno : node.end_lineno]) if is_function else ""
        document = "\n".join(" ".join(part.split()) for part in (head or name, rest, body) if part.strip())
        if len(summary.split()) > 2 and len(document.split()) > 5:
            yield Entry(name, module.split(".")[0], module, summary, docstring, document[:MAX_DOCUMENT_CHARACTERS])
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _read_node(child, f"{name}.{child.name}", module, lines)


def _grouped(entries: list[Entry], attribute: str) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(getattr(entry, attribute), []).append(entry)
    return groups


def _shuffled(rows: list[tuple[str, ...]], columns: list[str], choose: random.Random) -> Dataset:
    choose.shuffle(rows)
    return Dataset.from_dict({column: [row[i] for row in rows] for i, column in enumerate(columns)})
