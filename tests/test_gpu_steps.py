"""What a GPU is to be measured on runs in small on a CPU, each step once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_step_in_small(tmp_path):
    output = tmp_path / "tiny.json"
    command = ["bash", "examples/benchmarks/gpu.sh", str(output)]
    environment = {**os.environ, "SIZE": "tiny", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "0 steps are left." in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
    steps = json.loads(output.read_text())["steps"]
    assert list(steps) == ["main job", "precision", "rates", "memory 32", "memory 64", "llara"]
    assert steps["precision"]["nv-embed, sdpa, lowest cosine to float32"] > 0.99
    assert steps["rates"]["nv-embed, sdpa, times stock"] > 0
    peaks = [steps[f"memory {tokens}"]["gradient cache, MB at the peak"] for tokens in (32, 64)]
    assert 0 < peaks[0] < peaks[1]
    assert all(loss > 0 for loss in steps["llara"]["loss"])
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout == "0 steps are left.\n"  # nothing is run again
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table: gpu -->\n<!-- end -->\n")
    table = [sys.executable, "-m", "examples.benchmarks.gpu_steps", "--output", str(output), "--size", "tiny"]
    subprocess.run([*table, "--readme", str(readme)], cwd=ROOT, check=True, env=environment)
    assert f"| rates: tokens | {steps['rates']['tokens']} |" in readme.read_text()
