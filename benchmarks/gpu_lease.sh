#!/usr/bin/env bash
# Ten minutes of one GPU in one command: correctness first, then speed of S/4, S/2, B/2 and XL/2 as a fraction of the measured
# peak, with memory, first steps and sampling, then time to the first step, and what surrounds the step. A short table last.
#
#     bash benchmarks/gpu_lease.sh [OUT]          default: docs/bench/lease
#
# Each part has its own time limit and writes OUT/PART.json when it ends; OUT/gpu_lease.json has all of them. A part that is
# there already is not repeated: the same command continues. Without a GPU all parts run with tiny models, as a test.
#
#     BUDGET=600           seconds in all; a part that would have less than 15 of them left is skipped
#     ONLY="s2 b2"         these parts alone          SKIP="xl2"   all but these          FRESH=1   measure again
#     PYTHON=python3       with selftrans installed, or PYTHONPATH=src
set -u -o pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-${OUT:-$here/../docs/bench/lease}}
python=${PYTHON:-python3}
budget=${BUDGET:-600}
parts="correctness s2 b2 s4 xl2 sampling first_step around"
declare -A limits=([correctness]=130 [s2]=90 [b2]=100 [s4]=70 [xl2]=110 [sampling]=60 [first_step]=90 [around]=75)

mkdir -p "$out" || exit 1
toy=
slower=1
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "no GPU: tiny models, which show only that the parts run"
    toy=--toy
    slower=4
fi
failed=0
for part in $parts; do
    case " ${ONLY:-$parts} " in *" $part "*) ;; *) continue ;; esac
    case " ${SKIP:-} " in *" $part "*) continue ;; esac
    if [ -s "$out/$part.json" ] && [ -z "${FRESH:-}" ] && ! grep -q '"failed"' "$out/$part.json"; then
        echo "$part: measured already"
        continue
    fi
    left=$((slower * budget - SECONDS))
    limit=$((slower * ${limits[$part]}))
    if [ "$left" -lt 15 ]; then
        echo "$part: skipped, the time is over"
        continue
    fi
    [ "$left" -lt "$limit" ] && limit=$left
    rm -f "$out/$part.json"
    timeout --kill-after=5 "$limit" "$python" "$here/gpu_parts.py" "$part" --out "$out" --limit "$limit" $toy 2>"$out/$part.log"
    status=$?
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        echo "$part: stopped after $limit s"
    fi
    if [ "$status" -ne 0 ]; then
        failed=1
        tail -n 3 "$out/$part.log" >&2
    fi
done
"$python" "$here/gpu_parts.py" table --out "$out"
exit "$failed"
