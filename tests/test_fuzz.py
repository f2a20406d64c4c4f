"""Sealed folders with random damage: no code runs, no traceback, an end within seconds and a bounded memory.

``FUZZ=2000 pytest -m slow tests/test_fuzz.py -s`` says how many folders, and prints what became of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import TEXTS
from peft import LoraConfig
from test_trust import EVIL

from st_llm_embed import build_model
from st_llm_embed.cli import main
from st_llm_embed.hub import save_sealed
from st_llm_embed.hub.checking import fresh_python
from st_llm_embed.trust import load_trusted
from st_llm_embed.weights.averaging import average_checkpoints

FOLDERS = int(os.environ.get("FUZZ", "2000"))
ONLY = [int(number) for number in os.environ.get("FUZZ_ONLY", "").split()]
PARTS = 8
SECONDS = 10
GIGABYTE = 1 << 20  # in the kilobytes of getrusage
KEYS = (
    *(
        "auto_map",
        "auto\\u005fmap",
        "custom_pipelines",
        "trust_remote_code",
        "type",
        "types",
        "path",
        "activation_function",
    ),
    *(
        "tokenizer_class",
        "processor_class",
        "architectures",
        "model_type",
        "attn_implementation",
        "_attn_implementation",
    ),
    *("model_kwargs", "processor_kwargs", "config_kwargs", "tokenizer_args", "base_model_name_or_path", "peft_type"),
    *("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "head_dim", "num_latents", "num_heads"),
    *(
        "quantization_config",
        "dtype",
        "max_seq_length",
        "rope_parameters",
        "is_causal",
        "weight_map",
        "prompts",
        "texts",
    ),
    *(
        "embeddings",
        "add_eos",
        "attention",
        "window",
        "instruction_mask",
        "num_layers",
        "pooling_mode",
        "requirements",
    ),
)


def values(rng: random.Random, elsewhere: Path) -> object:
    evil = {
        "AutoConfig": rng.choice(["evil.Cfg", f"{elsewhere}--evil.Cfg", "1_X/evil.Cfg", "org/other--evil.Cfg"]),
        "AutoTokenizer": [None, "evil.Tok"],
    }
    chosen = [
        *(None, True, False, 0, -1, 1, 2, 7, 10**5, 10**9, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf")),
        *("", " ", "a", "evil.Evil", "os.system", "../x", "/etc/passwd", "a\n\x1b[31m", "\ud800", "日本", "x" * 5000),
        *("sentence_transformers.base.modules.router.Router", "torch.hub.load", "float8_e5m2", "bfloat16", "llama"),
        *([], {}, [1], [[]], {"x": 1}, ["evil.Evil"], {"trust_remote_code": True}, {"": None}, evil),
    ]
    return rng.choice(chosen)


def places(content: object) -> list[tuple[object, object]]:
    """Every container in a JSON document with a key in it."""
    found, waiting = [], [content]
    while waiting:
        here = waiting.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else []
        found += [(here, key) for key in keys]
        waiting += [here[key] for key in keys]
    return found


def damage(folder: Path, rng: random.Random, elsewhere: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    file = rng.choice(files)
    configurations = [file for file in files if file.suffix == ".json" and file.name != "tokenizer.json"]
    kind = rng.choice(
        ["edit", "edit", "edit", "add", "add", "delete", "bytes", "cut", "swap", "replace", "name", "code"]
    )
    if kind in ("edit", "add", "delete") and configurations:
        file = rng.choice(configurations)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return "nothing"
        where = places(content)
        if kind == "add" or not where:
            holders = [holder for holder, _ in where if isinstance(holder, dict)] or [{}]
            rng.choice(holders)[rng.choice(KEYS)] = values(rng, elsewhere)
        else:
            holder, key = rng.choice(where)
            if kind == "edit":
                holder[key] = values(rng, elsewhere)
            else:
                del holder[key]
        text = json.dumps(content)
        if rng.random() < 0.2:
            text = text.replace("auto_map", "auto\\u005fmap").replace("/", "\\u002f")
        file.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    elif kind == "bytes":
        content = bytearray(file.read_bytes())
        for _ in range(rng.randint(1, 8)):
            if content:
                content[rng.randrange(min(len(content), 4096))] = rng.randrange(256)
        file.write_bytes(content)
    elif kind == "cut":
        content = file.read_bytes()
        file.write_bytes(content[: rng.randrange(len(content) + 1)] + rng.choice([b"", b"\x00" * 9, b"\xef\xbb\xbf"]))
    elif kind == "swap":
        other = rng.choice(files)
        content, theirs = file.read_bytes(), other.read_bytes()
        file.write_bytes(theirs)
        other.write_bytes(content)
    elif kind == "replace":
        file.unlink()
        rng.choice(
            [
                lambda: None,
                lambda: file.mkdir(),
                lambda: os.mkfifo(file),
                lambda: file.symlink_to("/etc/passwd"),
                lambda: file.symlink_to(file),
                lambda: file.symlink_to(rng.choice([other for other in files if other != file])),
            ]
        )()
    elif kind == "name":
        name = rng.choice([b"x\n\x1b[31m", b"\xff\xfe", b" ", b"-rf", b"pytorch_model.bin", b"adapter_config.json"])
        Path(os.fsdecode(os.path.join(os.fsencode(file.parent), name))).write_text(rng.choice(["", "{}", "x"]))
    elif kind == "code":
        rng.choice([*folder.glob("*.py"), folder / "evil.py"]).write_text(EVIL.format(marker=str(elsewhere / "ran")))
    return kind


def open_it(folder: Path, scratch: Path) -> tuple[str, str]:
    """What becomes of a folder, in words, and what was printed."""
    said, outcomes = io.StringIO(), []
    acts = (
        lambda: main(["check", str(folder)]),
        lambda: load_trusted(folder, device="cpu").encode(list(TEXTS)),
        lambda: average_checkpoints([folder, folder], scratch / "average"),
    )
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        for act in acts:
            try:
                status = act()
                outcomes.append(str(status) if isinstance(status, int) else "0")
            except (ValueError, OSError, RuntimeError, ImportError):
                outcomes.append("2")
            except BaseException:
                traceback.print_exc()
                outcomes.append("1")
    return " ".join(outcomes), said.getvalue()


@pytest.fixture(scope="module")
def sealed(tmp_path_factory, llm) -> list[Path]:
    root = tmp_path_factory.mktemp("sealed")
    model = build_model(llm, "last-token")
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return [
        save_sealed(build_model(llm, "nv-embed", num_latents=8, num_heads=2, head_dim=16), root / "own"),
        save_sealed(build_model(llm, "mean"), root / "stock"),
        save_sealed(model, root / "adapter"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_random_damage(sealed, tmp_path, part):
    outcomes, slowest, largest, failures = Counter(), 0.0, 0, []
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "evil.py").write_text(EVIL.format(marker=str(elsewhere / "ran")))
    torch.set_num_threads(1)  # a fork has no threads of its parent's
    with fresh_python() as python:
        python.take_reference(sealed[1], ["a"], "cpu", True)  # it starts here, and not in a child
        for number in ONLY or range(part, FOLDERS, PARTS):
            rng = random.Random(number)
            folder, scratch = tmp_path / "model", tmp_path / "scratch"
            shutil.copytree(rng.choice(sealed), folder)
            place = rng.choice(["evil.py", "1_X/evil.py", "2_Normalize/evil.py"])
            (folder / place).parent.mkdir(exist_ok=True)
            (folder / place).write_text(EVIL.format(marker=str(elsewhere / "ran")))
            kinds = []
            for _ in range(rng.randint(1, 3)):
                with contextlib.suppress(OSError):
                    kinds.append(damage(folder, rng, elsewhere))
            scratch.mkdir()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            start, child = time.monotonic(), os.fork()
            if child == 0:
                signal.alarm(6 * SECONDS)  # rather than to hang the test
                python._started = lambda process=python.process: process  # whose parent this child is not
                try:
                    outcome, said = open_it(folder, scratch)
                    (scratch / "outcome").write_text(outcome)
                    (scratch / "said").write_text(said, errors="replace")
                finally:
                    os._exit(0)
            _, status, usage = os.wait4(child, 0)
            slowest = max(slowest, time.monotonic() - start)
            largest = max(largest, usage.ru_maxrss - before)
            outcome = (scratch / "outcome").read_text() if (scratch / "outcome").is_file() else f"status {status}"
            said = (scratch / "said").read_text() if (scratch / "said").is_file() else ""
            outcomes[outcome] += 1
            ran = (elsewhere / "ran").exists()
            if status or ran or "1" in outcome or "Traceback" in said or "\x1b" in said:
                failures.append(f"folder {number}: {kinds}, code ran: {ran}, {outcome}\n{said[-2000:]}")
            shutil.rmtree(folder)
            shutil.rmtree(scratch)
    print(
        f"\n{sum(outcomes.values())} folders; check, load, average: {dict(outcomes)}; slowest {slowest:.1f} s; "
        f"most memory {largest / 1024:.0f} MB"
    )
    assert not failures, "\n".join(failures)
    assert slowest < SECONDS and largest < GIGABYTE
