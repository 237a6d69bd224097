#!/usr/bin/env bash
# Most of what benchmarks/ holds of a card, measured again: steps, first tokens, attention, choices, and vLLM's table.
#     scripts/measure_all.sh DIRECTORY [decode cold quantized attention choose table]
# Each part appends to a file in DIRECTORY; without names all are run, the table last and longest. Put what shall be kept into
# benchmarks/ and run `python scripts/benchmark.py report`.
set -euo pipefail
parts=(decode cold quantized attention choose table)
directory=${1:-}
names=("${@:2}")
for name in "${names[@]}"; do
    [[ " ${parts[*]} " == *" $name "* ]] || directory=
done
if [[ -z $directory || $directory == -* ]]; then
    echo "usage: scripts/measure_all.sh DIRECTORY [${parts[*]}]" >&2
    exit 2
fi
mkdir -p "$directory"
directory=$(cd "$directory" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}

decode() { "$python" scripts/benchmark.py decode --repeats 3 --output "$directory/decode.jsonl" --random_weights "$@"; }

run_decode() {
    local model
    for model in llama-3.2-1b llama-3.1-8b llama-3.2-3b qwen2.5-7b qwen3-8b mistral-7b; do decode $model; done
    decode llama-3.1-8b --context 32768
    for rows in 8 16; do decode llama-3.2-1b --batch_size $rows --explain; done
    for rows in 64 256; do decode llama-3.2-1b --batch_size $rows --prompt_len 128 --explain; done
    decode llama-3.1-8b --batch_size 256 --prompt_len 128 --explain
}

run_cold() { decode llama-3.2-1b --cold; }

run_quantized() {
    local mode
    for mode in fp8 int8 int4; do
        decode llama-3.1-8b --quantize $mode
        for rows in 16 64; do decode llama-3.1-8b --quantize $mode --batch_size $rows --prompt_len 128 --explain; done
    done
    decode llama-3.2-1b --quantize int4
}

run_attention() {
    "$python" scripts/benchmark_kernels.py attention --output "$directory/attention.jsonl" --chart "$directory/attention.png"
}

run_choose() {
    "$python" scripts/benchmark_kernels.py choose --in_step llama-3.2-1b --batch_size 1 --output "$directory/choose.jsonl"
}

run_table() {
    "$python" scripts/benchmark.py throughput --scenario vllm-table --engines rooflama transformers-static \
        --output "$directory/table.jsonl"
}

[[ ${#names[@]} -gt 0 ]] || names=("${parts[@]}")
for name in "${names[@]}"; do
    echo "== $name" >&2
    "run_$name"
done
