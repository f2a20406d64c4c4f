#!/usr/bin/env bash
# A sealed model whose pooling is the mean or the last token, as GGUF: converted by llama.cpp's own script, embedded by
# llama-cpp-python, compared with its reference.json.
#
#   bash examples/serving/llama_cpp.sh MODEL FILE.gguf [f32|f16|bf16|q8_0]
#
#   VENV=.venv-llama   an environment of its own; llama.cpp is compiled there once: 9 minutes of one core
#   CHECK=st-llm-embed the command of this package, in its own environment
#
# Measured with llama-cpp-python 0.3.36 (llama.cpp 0c1e570) on SmolLM2's first six layers, mean and lasttoken, prompts
# and a text of 2,217 tokens cut to 128 included: the least cosine is 1.000000 in f32 and f16, 0.99974 and 0.99978 in
# q8_0.
set -euo pipefail
model=$1 file=$2 type=${3:-f16}
here=$(dirname "$0")
venv=$(realpath -m "${VENV:-.venv-llama}")
if [ ! -x "$venv/bin/convert" ]; then
    "${PYTHON:-python3}" -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet torch==2.13.0
    "$venv/bin/pip" install --quiet transformers==5.23.0 sentencepiece==0.2.3 protobuf scikit-build-core ninja
    # Its source brings llama.cpp, and so the converter of the same commit. Elsewhere: git clone
    # https://github.com/ggml-org/llama.cpp, which has convert_hf_to_gguf.py at its root.
    "$venv/bin/pip" download --quiet --no-deps --no-build-isolation --no-binary :all: --dest "$venv" llama-cpp-python==0.3.36
    tar --directory "$venv" --extract --file "$venv/llama_cpp_python-0.3.36.tar.gz"
    CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF" \
        "$venv/bin/pip" install --quiet "$venv/llama_cpp_python-0.3.36.tar.gz"
    printf '#!/bin/sh\nexec "%s" "%s" "$@"\n' "$venv/bin/python" \
        "$venv/llama_cpp_python-0.3.36/vendor/llama.cpp/convert_hf_to_gguf.py" > "$venv/bin/convert"
    chmod +x "$venv/bin/convert"
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$venv/bin/python" "$here/gguf_model.py" prepare "$model" "$scratch/model"
"$venv/bin/convert" "$scratch/model" --outtype "$type" --outfile "$file"
"$venv/bin/python" "$here/gguf_model.py" embed "$model" "$file" "$scratch/vectors.json"
"${CHECK:-st-llm-embed}" check "$model" --vectors "$scratch/vectors.json"
