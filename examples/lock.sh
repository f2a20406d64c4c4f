#!/usr/bin/env bash
# Write examples/locked.txt (the newest versions) and examples/lowest.txt (the lowest that pyproject.toml allows), both for
# Python 3.10 and later on any system. uv resolves them. torch is left to install.sh, and what comes with its GPU builds.
set -euo pipefail
cd "$(dirname "$0")/.."
compile() { # compile NAME RESOLUTION
    echo "# By examples/lock.sh. Constraints of pip: what is not installed anyway is not installed by them." > "examples/$1.txt"
    echo "setuptools>=77.0.3" |
        uv pip compile pyproject.toml - --universal --python-version 3.10 --all-extras --resolution "$2" --upgrade \
            --only-binary :all: --no-annotate --no-header --quiet |
        grep --extended-regexp --invert-match "^(torch|triton|cuda-|nvidia-)" >> "examples/$1.txt"
}
compile locked highest
compile lowest lowest-direct
