#!/usr/bin/env bash
# All checks: installs into .venv, then runs ruff and pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/install.sh
install test
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/python" -m pytest "$@"
