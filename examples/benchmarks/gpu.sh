#!/usr/bin/env bash
# Everything that a GPU is to be measured on, in steps of at most eight minutes each. What OUTPUT has is not run again: a
# step that was cut off is begun anew (a row of the study goes on from its last checkpoint), so start it until it says that
# nothing is left.
#
#   bash examples/benchmarks/gpu.sh gpu.json DATA            # DATA: the folder of the study's data sets; without it no rows
#   SIZE=tiny bash examples/benchmarks/gpu.sh tiny.json      # every step in small, on whatever there is
#   python -m examples.benchmarks.gpu_steps --output gpu.json --readme examples/benchmarks/README.md      # the table
set -uo pipefail
output=$(realpath -m "$1")
data=${2:+$(realpath "$2")}
size=${SIZE:-full}
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
left=0
while IFS= read -r step; do
    timeout --kill-after=20 480 "$python" -m examples.benchmarks.gpu_steps --output "$output" --size "$size" \
        ${data:+--data "$data"} --step "$step" < /dev/null || { echo "NOT DONE: $step (status $?)"; left=$((left + 1)); }
done < <("$python" -m examples.benchmarks.gpu_steps --output "$output" --size "$size" ${data:+--data "$data"} --list)
echo "$left steps are left."
[ "$left" = 0 ]
