#!/usr/bin/env bash
# From an LLM to a published embedding model, offline: installs into .venv, then runs the demo. Arguments go to the demo.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/install.sh
install demo
"$venv/bin/python" -m examples.demo "$@"
