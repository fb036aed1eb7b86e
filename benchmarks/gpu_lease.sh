#!/usr/bin/env bash
# Minutes of one GPU in one command: correctness first, then what decides most. docs/gpu-lease.md has the parts in their order,
# how long each takes and what it measures. A short table comes last.
#
#     bash benchmarks/gpu_lease.sh [OUT]          default: docs/bench/lease
#
# OUT gets two files, which are written again after every piece of a part: gpu_lease.json has all results, lease.tgz the json
# and the log of each part. The same command continues from lease.tgz: first the parts that are missing, then those that failed or
# were stopped. Each part has its own time limit. Without a GPU all parts run with tiny models, as a test.
#
#     BUDGET=520           seconds in all, table included; a part that would have less than 15 of them left is skipped
#     REQUIRE_GPU=1        end at once on a machine without a GPU
#     ONLY="s2 b2"         these parts alone          SKIP="xl2"   all but these          FRESH=1   measure again
#     PYTHON=python3       with the packages that selftrans needs; its source is taken from this repository
set -u -o pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-${OUT:-$here/../docs/bench/lease}}
python=${PYTHON:-python3}
budget=${BUDGET:-520}
closing=10  # seconds for the table, and for ending a part that does not stop by itself
parts="correctness b2 first_step xl2 memory s2 loading attention variants compare route sampling variants_s2 s4 around tests tuned"
# seconds; docs/gpu-lease.md has what each part is expected to take
declare -A limits=([correctness]=90 [b2]=100 [first_step]=100 [xl2]=130 [memory]=110 [s2]=80 [variants]=280 [loading]=40
    [attention]=40 [compare]=180 [route]=150 [sampling]=100 [variants_s2]=240 [s4]=80 [around]=60 [tests]=150 [tuned]=300)
export PYTHONPATH="$here/../src${PYTHONPATH:+:$PYTHONPATH}"

gpu() {  # torch takes seconds to ask; nvidia-smi is not in every container
    if command -v nvidia-smi >/dev/null; then
        local list
        list=$(nvidia-smi -L)
        printf '%s\n' "$list" >&2
        case $list in GPU* | *$'\n'GPU*) ;; *) return 1 ;; esac
    else
        "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
    fi
}

toy=
if ! gpu; then
    if [ -n "${REQUIRE_GPU:-}" ]; then
        echo "no GPU was found, and REQUIRE_GPU is set" >&2
        exit 1
    fi
    echo "no GPU: tiny models, which show only that the parts run"
    toy=--toy
    budget=$((4 * budget))
fi
mkdir -p "$out" && work=$(mktemp -d) || exit 1
watcher=
stop_watching() {
    [ -n "$watcher" ] && kill "$watcher" 2>/dev/null && wait "$watcher" 2>/dev/null
    watcher=
}
trap 'stop_watching; rm -rf "$work"' EXIT
watch() {  # what the GPU does meanwhile: percent of the time in kernels, MHz, W; it is only read
    command -v nvidia-smi >/dev/null || return
    nvidia-smi --query-gpu=utilization.gpu,clocks.sm,power.draw --format=csv,noheader,nounits -i 0 -lms 500 \
        >"$work/$1-gpu.log" 2>/dev/null &
    watcher=$!
}
if [ -s "$out/lease.tgz" ]; then
    tar -xzf "$out/lease.tgz" -C "$work" --no-same-owner || exit 1
fi

missing= broken= failed=0
for part in $parts; do
    case " ${ONLY:-$parts} " in *" $part "*) ;; *) continue ;; esac
    case " ${SKIP:-} " in *" $part "*) continue ;; esac
    if [ -n "${FRESH:-}" ] || [ ! -s "$work/$part.json" ]; then
        missing="$missing $part"
    elif grep -q -e '"failed"' -e '"unfinished"' "$work/$part.json"; then
        broken="$broken $part"
    else
        echo "$part: measured already"
    fi
done
for part in $missing $broken; do
    left=$((budget - closing - SECONDS))
    limit=${limits[$part]}
    [ -n "$toy" ] && limit=$((4 * limit))
    if [ "$left" -lt 15 ]; then
        echo "$part: skipped, the time is over"
        failed=1
        continue
    fi
    [ "$left" -lt "$limit" ] && limit=$left
    began=$SECONDS
    rm -rf "$work/$part.log" "$work/$part-gpu.log" "$work/bench-$part"-*
    [ -n "${FRESH:-}" ] && rm -f "$work/$part.json"
    [ -z "$toy" ] && watch "$part"
    timeout --kill-after=5 "$limit" "$python" "$here/gpu_parts.py" "$part" --out "$work" --into "$out" --limit "$limit" $toy \
        2>"$work/$part.log"
    status=$?
    stop_watching
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        echo "$part: stopped after $((SECONDS - began)) of $limit s"
    fi
    if [ "$status" -ne 0 ]; then
        failed=1
        tail -n 3 "$work/$part.log" >&2
    fi
    if [ "$status" -eq 3 ]; then  # torch cannot use the GPU: no other part can
        break
    fi
done
"$python" "$here/gpu_parts.py" table --out "$work" --into "$out" || failed=1
exit "$failed"
