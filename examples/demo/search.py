"""Search the installed Python's documentation with a published model: what its user writes, with sentence-transformers
and nothing else.

    python examples/demo/search.py MODEL_FOLDER "how do I parse command line arguments?" ...

The corpus is one entry for each public module of the standard library: its name and the first paragraphs of its
docstring.
"""

import ast
import sys
import sysconfig
from pathlib import Path

from sentence_transformers import SentenceTransformer, util

MAX_CHARACTERS = 300


def public_modules() -> dict[str, str]:
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for name in sorted(sys.stdlib_module_names):
        for file in (root / f"{name}.py", root / name / "__init__.py"):
            if not name.startswith("_") and file.is_file():
                docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8", errors="replace")))
                if docstring:
                    found[name] = f"{name}\n{' '.join(docstring.split())[:MAX_CHARACTERS]}"
    return found


def main(folder: str, *questions: str) -> None:
    model = SentenceTransformer(folder, trust_remote_code=True)
    modules = public_modules()
    documents = model.encode_document(list(modules.values()), convert_to_tensor=True)
    queries = model.encode_query(list(questions), convert_to_tensor=True)
    names = list(modules)
    for question, hits in zip(questions, util.semantic_search(queries, documents, top_k=3), strict=True):
        print(question, *(f"  {hit['score']:.3f}  {names[hit['corpus_id']]}" for hit in hits), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
