#!/usr/bin/env bash
# Fuzzing: run.sh RUNS [TARGET...]. RUNS for each target, beginning with the corpus; targets: the C files here, and the
# readers of readers.py as read_NAME. Memory is bounded: inputs have at most 4 KiB, and one allocation of the core, whose
# shapes they choose, at most 64 MiB. A failing input is kept in $OUT. The environment may set PYTHON, OUT, SECONDS_EACH
# (a limit for each target; 0: none) and SEED (of the targets in C; without it, each run takes other inputs).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
runs=${1:?"run.sh RUNS [TARGET...]"}
shift
python=${PYTHON:-python3}
out=${OUT:-$here/../../../build/fuzz}
limit=${SECONDS_EACH:-0}
mkdir -p "$out"
out=$(cd "$out" && pwd)
readers=(safetensors torch gguf config index scaled exact arguments)
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    for c in "$here"/*.c; do targets+=("$(basename "$c" .c)"); done
    targets+=("${readers[@]/#/read_}")
fi
if [[ " ${targets[*]} " =~ \ [^r][a-z]*\  ]]; then
    command -v clang >/dev/null || { echo "NOT RUN: fuzzing (no clang)"; exit 0; }
    "$here/build.sh" "$out/bin"
fi
one() { # TARGET
    local log=$out/$1.log begun=$SECONDS
    if [[ $1 = read_* ]]; then
        OMP_NUM_THREADS=1 "$python" "$here/readers.py" "${1#read_}" "$runs" --seconds "$limit" >"$log" 2>&1 ||
            { tail -30 "$log"; return 1; }
        grep ' runs (' "$log"
        return
    fi
    mkdir -p "$out/found/$1"
    "$out/bin/$1" -seed="${SEED:-0}" -runs="$runs" -max_total_time="$limit" -max_len=4096 -len_control=20 -timeout=60 \
        -malloc_limit_mb=64 -rss_limit_mb=2048 -artifact_prefix="$out/failing-$1-" -print_final_stats=1 -verbosity=0 \
        "$out/found/$1" "$here/corpus/$1" >"$log" 2>&1 || { tail -40 "$log"; return 1; }
    echo "$1: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") runs in $((SECONDS - begun)) s"
}
failed=0
jobs=()
for target in "${targets[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-$(nproc)}" ]; do wait -n || true; done
    one "$target" &
    jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job" || failed=1; done
exit $failed
