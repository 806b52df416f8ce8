#!/bin/bash
# What `uhmm run` costs a program that fits in its budget. See README.md.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
. "$here/programs.sh"
uhmm=${UHMM:-$here/../../target/release/uhmm}
rounds=5
json=no
chosen=()

usage() {
    cat <<TEXT
Usage: overhead.sh [--rounds N] [--json] [PROGRAM..]

  PROGRAM     $programs (default: sort dict)
  --rounds N  so often each, by turns (default: $rounds)
  --json      an array of {program, alone_seconds, uhmm_seconds, ratio, alone_peak_kib, uhmm_peak_kib}

UHMM names the uhmm command (default: target/release/uhmm of this checkout).
TEXT
}

while [ $# -gt 0 ]; do
    case $1 in
        --rounds) rounds=$2; shift 2 ;;
        --json) json=yes; shift ;;
        --help | -h) usage; exit 0 ;;
        *)
            [[ " $programs " == *" $1 "* ]] || { usage >&2; exit 2; }
            chosen+=("$1")
            shift
            ;;
    esac
done
[[ $rounds =~ ^[1-9][0-9]*$ ]] || fail "--rounds is a whole number, not $rounds"
[ -x "$uhmm" ] || fail "$uhmm is not there; build it (cargo build --release) or set UHMM"
[ ${#chosen[@]} -gt 0 ] || chosen=(sort dict)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

results=()
table() { [ $json = yes ] || printf '%-10s %8s %8s %7s %11s %11s\n' "$@"; }
table program alone/s uhmm/s ratio alone-KiB uhmm-KiB
for name in "${chosen[@]}"; do
    command_of "$name" || fail "$name is not installed"
    # Room for twice what it has by itself: nothing is ever moved.
    budget=$(($(natural "${command[@]}") * 2 + 64))
    under=("$uhmm" run --quiet --ram "${budget}MiB" -- "${command[@]}")
    alone_times=() uhmm_times=()
    for _ in $(seq "$rounds"); do
        alone_times+=("$(timed "$work/alone" "${command[@]}")") || fail "$name failed by itself"
        uhmm_times+=("$(timed "$work/under" "${under[@]}")") || fail "$name failed under uhmm run"
        cmp -s "$work/alone" "$work/under" || fail "$name printed something else under uhmm run"
    done
    alone=$(median "${alone_times[@]}")
    by_uhmm=$(median "${uhmm_times[@]}")
    ratio=$(awk -v a="$alone" -v b="$by_uhmm" 'BEGIN { printf "%.3f", b / a }')
    alone_peak=$(peak_kib "${command[@]}")
    uhmm_peak=$(peak_kib "${under[@]}")
    table "$name" "$alone" "$by_uhmm" "$ratio" "$alone_peak" "$uhmm_peak"
    results+=("$(printf '{"program": "%s", "alone_seconds": %s, "uhmm_seconds": %s, "ratio": %s, "alone_peak_kib": %d, "uhmm_peak_kib": %d}' \
        "$name" "$alone" "$by_uhmm" "$ratio" "$alone_peak" "$uhmm_peak")")
done
if [ $json = yes ]; then
    (IFS=, && printf '[%s]\n' "${results[*]}")
fi
