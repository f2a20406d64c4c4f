"""A program, for ``check``: a Python that cannot import this package loads model folders and writes their references.

Argument: the name of the package to hide. Each line of standard input is a request, a JSON object:

- ``folder``, ``device``, ``texts``, and ``reference``, the path of ``reference.py``;
- ``model_class``: the name of the model's class in sentence-transformers;
- ``code``: a folder whose package ``published`` has the model's own files, or null to trust the folder's;
- ``scratch``: a folder for the answer (``taken.json``), for all that is printed (``log``), and for module caches.

Each is answered by a line with its exit status, in a fork, so that no model knows of another.
"""

import importlib
import json
import os
import runpy
import sys
import traceback

import sentence_transformers
import transformers.dynamic_module_utils
from sentence_transformers.base import BaseModel


def load(folder: str, device: str, code: str | None, class_name: str) -> BaseModel:
    options = {"device": device, "local_files_only": True}
    model_class = getattr(sentence_transformers, class_name)
    if code is None:
        return model_class(folder, trust_remote_code=True, **options)
    sys.path.insert(0, code)
    with open(os.path.join(folder, "modules.json"), encoding="utf-8") as file:
        types = [entry["type"] for entry in json.load(file)]
    classes = {}
    for name in types:
        module, _, attribute = name.rpartition(".")
        if not name.startswith("sentence_transformers."):
            # What is not sealed names the hidden package itself, and is to fail as it does for everybody.
            place = module if "." in module else f"published.{module}"
            classes[name] = getattr(importlib.import_module(place), attribute)
    return model_class._load_with_module_classes(folder, classes, **options)


def answer(request: dict) -> int:
    scratch = request["scratch"]
    log = os.open(os.path.join(scratch, "log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        # Module code is cached by a folder's name: in a cache of its own no older copy answers.
        transformers.dynamic_module_utils.HF_MODULES_CACHE = os.path.join(scratch, "modules")
        transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # nobody is there to be asked
        model = load(request["folder"], request["device"], request["code"], request["model_class"])
        taken = runpy.run_path(request["reference"])["take_reference"](model, request["texts"])
        with open(os.path.join(scratch, "taken.json"), "w", encoding="utf-8") as file:
            json.dump(taken, file)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    # Importing it now fails.
    sys.modules[sys.argv[1]] = None  # type: ignore[assignment]  # Python's documented way; typeshed has no None
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        if sys.platform == "linux":
            child = os.fork()
            if child == 0:
                os._exit(answer(json.loads(line)))
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=replies, flush=True)
        else:  # where a fork is not safe, or there is none: the caller starts another process for the next
            print(answer(json.loads(line)), file=replies, flush=True)
            break
