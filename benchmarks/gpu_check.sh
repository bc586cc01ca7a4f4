#!/usr/bin/env bash
# Checks and measures the CUDA back end on a machine with a GPU, from a checkout and without installing anything.
#
#   benchmarks/gpu_check.sh                       # all parts, in under 8 minutes
#   benchmarks/gpu_check.sh correctness blocks    # some, in this order
#   OUT=/tmp/gpu BLOCKS=200 COMPILE=1 benchmarks/gpu_check.sh blocks
#
# Parts: correctness, blocks, networks, training, ops, table1; before the first benchmark the kernels of all requested
# parts are compiled, several at a time. Each part ends within its own limit, and a failed part does not stop the
# others. JSON files and one log are left in $OUT (results/gpu by default); standard output ends with a summary.
# Variables: TOTAL, CORRECTNESS, WARM, BLOCKS, NETWORKS, TRAINING, OPS and TABLE1 are seconds; DTYPES are the types of
# blocks and ops; COMPILE=1 makes torch.compile a peer; TRAIN and TEST are table1's data, TABLE1_ARGS further arguments
# of benchmarks/table1_gpu.py; QUINCUNX_COMMIT names the code in results without git. The script only reads the card's
# settings.
set -u
cd "$(dirname "$0")/.." || exit 2
OUT=${OUT:-results/gpu}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
TOTAL=${TOTAL:-470}
DTYPES=${DTYPES:-bfloat16,float16,float32}
COMPILING=--no-compile
[ "${COMPILE:-0}" = 1 ] && COMPILING=--compile
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
LOG=$OUT/gpu_check.log
: >"$LOG"
SECONDS=0
OUTCOMES=""
FAILED=0
ALL="correctness blocks networks training ops table1"
# shellcheck disable=SC2086 # several words
[ "$*" = "" ] || [ "$*" = all ] && set -- $ALL
for wanted in "$@"; do
    case " $ALL " in
    *" $wanted "*) ;;
    *)
        echo "gpu_check.sh: no part is called $wanted; there are all, $ALL" >&2
        exit 2
        ;;
    esac
done

note() { echo "$*" | tee -a "$LOG"; }

# part NAME SECONDS COMMAND...: runs it within its limit and the remaining total time
part() {
    local name=$1 limit=$2 left=$((TOTAL - SECONDS)) begin=$SECONDS code
    shift 2
    if [ "$left" -lt 15 ]; then
        note "== $name: no time left"
        OUTCOMES="$OUTCOMES $name:left-out"
        FAILED=1
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    note "== $name, at most $limit s"
    echo "\$ $*" >>"$LOG"
    # no pipe: a process that outlives its parent would keep it open
    local before
    before=$(wc -c <"$LOG")
    timeout -k 5 "$limit" "$@" >>"$LOG" 2>&1
    code=$?
    tail -c +$((before + 1)) "$LOG" >"$WORK/log"
    if [ "$code" != 0 ]; then
        FAILED=1
        tail -n 12 "$WORK/log" | cut -c1-240
    fi
    note "== $name: exit code $code after $((SECONDS - begin)) s"
    OUTCOMES="$OUTCOMES $name:$code:$((SECONDS - begin))s"
}

# bench SUITE SECONDS OPTIONS...: runs the cases that fit, plus 25 s for starting, the last case and the file
bench() {
    local suite=$1 seconds=$2
    shift 2
    rm -f "$OUT/bench-$suite-cuda.json"
    part "$suite" $((seconds + 25)) "$PYTHON" -m quincunx bench "$suite" --device cuda --budget "$seconds" \
        --out "$OUT" $COMPILING "$@"
    rm -f "$OUT/bench-$suite-cuda.svg"
}

correctness() {
    local seconds=${CORRECTNESS:-75}
    rm -f "$OUT/correct.json"
    part correctness $((seconds + 30)) "$PYTHON" benchmarks/gpu_correct.py --budget "$seconds" --grace 15 \
        --out "$OUT/correct.json"
}

table1() {
    local seconds=${TABLE1:-60}
    if [ ! -f benchmarks/table1_gpu.py ] || [ -z "${TRAIN:-}" ] || [ -z "${TEST:-}" ]; then
        note "== table1: TRAIN and TEST name no images by class, so nothing is trained"
        return
    fi
    # shellcheck disable=SC2086 # several arguments
    part table1 $((seconds + 20)) "$PYTHON" benchmarks/table1_gpu.py --train "$TRAIN" --test "$TEST" \
        --out "$OUT/table1.json" --budget "$seconds" ${TABLE1_ARGS:-}
    tail -n 20 "$WORK/log" | cut -c1-200 >"$WORK/table1"
}

part machine 60 "$PYTHON" benchmarks/gpu_summary.py --machine
cut -c1-240 "$WORK/log"
WARMED=0
# warm: compiles the kernels of all requested benchmarks, once
warm() {
    [ "$WARMED" = 1 ] && return
    WARMED=1
    local suites="" each
    for each in $WANTED; do
        case $each in blocks | networks | training | ops) suites="$suites $each" ;; esac
    done
    # shellcheck disable=SC2086 # several words
    part warm $((${WARM:-50} + 15)) "$PYTHON" benchmarks/gpu_warm.py $suites --dtype "$DTYPES" --budget "${WARM:-50}"
}

WANTED="$*"
for wanted in "$@"; do
    case $wanted in
    correctness | table1) "$wanted" ;;
    blocks)
        warm
        bench blocks "${BLOCKS:-90}" --dtype "$DTYPES"
        ;;
    networks)
        warm
        bench networks "${NETWORKS:-65}"
        ;;
    training)
        warm
        bench training "${TRAINING:-40}"
        ;;
    ops)
        warm
        bench ops "${OPS:-40}" --dtype "$DTYPES"
        ;;
    esac
done

{
    echo
    echo "==== summary after $SECONDS s:$OUTCOMES"
    [ -f "$WORK/table1" ] && cat "$WORK/table1"
    timeout 60 "$PYTHON" benchmarks/gpu_summary.py "$OUT"
} 2>&1 | tee -a "$LOG"
exit $FAILED
