#!/usr/bin/env bash
# The libraries that people put before a model, in an environment of their own (2.7 GB), and `clients.py` in it.
#
#   bash examples/serving/clients.sh MODEL [CLIENT ...]
set -euo pipefail
venv=${VENV:-.venv-clients}
if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet torch==2.13.0
    "$venv/bin/pip" install --quiet sentence-transformers==6.2.0 transformers==5.23.0 langchain-huggingface==1.2.3 \
        llama-index-embeddings-huggingface==0.8.0 sentence-transformers-haystack==2.0.0 chromadb==1.5.9 lancedb==0.40.0 \
        txtai==9.14.0 mteb==2.26.24
fi
HF_HUB_OFFLINE=1 "$venv/bin/python" "$(dirname "$0")/clients.py" "$@"
