#!/bin/bash
# The same program on kernel swap and under `uhmm run`, each with the same memory. See README.md.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
. "$here/programs.sh"
uhmm=${UHMM:-$here/../../target/release/uhmm}
limit=
swap_size=4096
directory=${TMPDIR:-/var/tmp}
json=no
rounds=1
chosen=()

usage() {
    cat <<TEXT
Usage: run.sh [--ram MIB] [--swap MIB] [--dir DIRECTORY] [--rounds N] [--json] [PROGRAM.. | -- COMMAND ARGS..]

  PROGRAM     $programs (default: all that are installed)
  --ram MIB   memory for the program (default: half of the most that it has by itself)
  --swap MIB  size of the swap file (default: $swap_size)
  --dir DIR   where the swap file and uhmm's file lie; the same disk for both (default: $directory)
  --rounds N  so often each, and the median of the times (default: $rounds)
  --json      an array of {program, ram_mib, swap_seconds, uhmm_seconds, swap_peak_kib, uhmm_peak_kib, ratio}

UHMM names the uhmm command (default: target/release/uhmm of this checkout). Needs root.
TEXT
}

own=()
while [ $# -gt 0 ]; do
    case $1 in
        --ram) limit=$2; shift 2 ;;
        --swap) swap_size=$2; shift 2 ;;
        --dir) directory=$2; shift 2 ;;
        --rounds) rounds=$2; shift 2 ;;
        --json) json=yes; shift ;;
        --help | -h) usage; exit 0 ;;
        --) shift; chosen=(own); own=("$@"); break ;;
        *)
            [[ " $programs " == *" $1 "* ]] || { usage >&2; exit 2; }
            chosen+=("$1")
            shift
            ;;
    esac
done
[[ ${limit:-1} =~ ^[1-9][0-9]*$ && $swap_size =~ ^[1-9][0-9]*$ ]] || fail "sizes are whole numbers of MiB"
[[ $rounds =~ ^[1-9][0-9]*$ ]] || fail "--rounds is a whole number, not $rounds"
[ "${chosen[*]}" != own ] || [ ${#own[@]} -gt 0 ] || fail "no command behind --"
[ "$(id -u)" = 0 ] || fail "a memory limit and a swap file need root"
[ -x "$uhmm" ] || fail "$uhmm is not there; build it (cargo build --release) or set UHMM"

group= swap= work= cgroup=

restore() {
    set +e
    # Swap first: what is still on it must come home, for which the limit must not stand in the way.
    if [ -n "$group" ] && [ -d "$group" ]; then
        for pid in $(cat "$group/cgroup.procs" 2>/dev/null); do kill -KILL "$pid" 2>/dev/null; done
        for _ in $(seq 50); do rmdir "$group" 2>/dev/null && break; sleep 0.1; done
    fi
    if [ -n "$swap" ]; then
        swapoff "$swap" 2>/dev/null
        rm -f "$swap"
    fi
    [ -z "$work" ] || rm -rf "$work"
}
trap restore EXIT
trap 'exit 130' INT TERM

# --- the limit: cgroup v1 or v2 -------------------------------------------------------------------------------

if [ -f /sys/fs/cgroup/cgroup.controllers ] && grep -qw memory /sys/fs/cgroup/cgroup.controllers; then
    cgroup=2
    echo +memory >/sys/fs/cgroup/cgroup.subtree_control 2>/dev/null || true
    group=/sys/fs/cgroup/uhmm-peers-$$
    mkdir "$group"
    [ -f "$group/memory.max" ] || fail "the memory controller cannot be enabled in /sys/fs/cgroup"
    # Swap itself is not limited.
    echo max >"$group/memory.swap.max"
elif [ -d /sys/fs/cgroup/memory ]; then
    cgroup=1
    group=/sys/fs/cgroup/memory/uhmm-peers-$$
    mkdir "$group"
    echo 60 >"$group/memory.swappiness"
else
    fail "no memory controller under /sys/fs/cgroup"
fi

# The group has $1 MiB from now on.
set_limit() {
    local file=$group/memory.limit_in_bytes
    [ $cgroup = 1 ] || file=$group/memory.max
    echo $(($1 << 20)) >"$file"
}

oom_kills() {
    local file=$group/memory.oom_control
    [ $cgroup = 1 ] || file=$group/memory.events
    awk '$1 == "oom_kill" { print $2; found = 1 } END { if (!found) print 0 }' "$file"
}

# The most memory that the group had, page cache and all, in KiB.
peak() {
    local file=$group/memory.max_usage_in_bytes
    [ $cgroup = 1 ] || file=$group/memory.peak
    if [ -r "$file" ]; then echo $(($(cat "$file") >> 10)); else echo 0; fi
}

reset_peak() {
    if [ $cgroup = 1 ]; then
        echo 1 >"$group/memory.force_empty" || true
        echo 0 >"$group/memory.max_usage_in_bytes" || true
    else
        echo reset >"$group/memory.peak" 2>/dev/null || true
    fi
}

swap=$(mktemp "$directory/uhmm-peers-swap.XXXXXX")
chmod 600 "$swap"
# Written, not only allocated: a file with holes cannot be swapped to.
dd if=/dev/zero of="$swap" bs=1M count="$swap_size" status=none
mkswap "$swap" >/dev/null
swapon "$swap" || fail "$directory cannot hold a swap file; choose another one with --dir"
work=$(mktemp -d "$directory/uhmm-peers.XXXXXX")

# --- the comparison --------------------------------------------------------------------------------------------

in_group() {
    (echo $BASHPID >"$group/cgroup.procs" && exec "$@")
}

field() {
    sed -n "s/.*\"$1\"[[:space:]]*:[[:space:]]*\\([0-9][0-9]*\\).*/\\1/p" "$2" | head -n 1
}

results=()
table() { [ $json = yes ] || printf '%-10s %8s %10s %10s %12s %12s %7s\n' "$@"; }

compare() {
    local name=$1 ram=$limit by_swap by_uhmm swap_peak uhmm_peak killed ratio
    if [ -z "$ram" ]; then
        ram=$(natural "${command[@]}") || fail "$name failed by itself"
        ram=$((ram / 2))
    fi
    killed=$(oom_kills)
    reset_peak
    set_limit "$ram"
    local swap_times=() uhmm_times=()
    for _ in $(seq "$rounds"); do
        by_swap=$(timed "$work/by-swap" in_group "${command[@]}") || fail "$name failed on kernel swap"
        [ "$(oom_kills)" = "$killed" ] || fail "$name was killed for want of memory: a larger --swap or --ram is needed"
        by_uhmm=$(TMPDIR=$directory timed "$work/by-uhmm" "$uhmm" run --quiet --ram "${ram}MiB" --device file: \
            --stats "$work/stats.json" -- "${command[@]}") || fail "$name failed under uhmm run"
        cmp -s "$work/by-swap" "$work/by-uhmm" || fail "$name printed something else under uhmm run"
        swap_times+=("$by_swap")
        uhmm_times+=("$by_uhmm")
    done
    by_swap=$(median "${swap_times[@]}")
    by_uhmm=$(median "${uhmm_times[@]}")
    swap_peak=$(peak)
    uhmm_peak=$(field peak_resident_bytes "$work/stats.json")
    [ -n "$uhmm_peak" ] || fail "no peak_resident_bytes in the statistics of uhmm run"
    uhmm_peak=$((uhmm_peak >> 10))
    ratio=$(awk -v a="$by_swap" -v b="$by_uhmm" 'BEGIN { printf "%.2f", a / (b > 0 ? b : 0.01) }')
    table "$name" "$ram" "$by_swap" "$by_uhmm" "$swap_peak" "$uhmm_peak" "$ratio"
    results+=("$(printf '{"program": "%s", "ram_mib": %d, "swap_seconds": %s, "uhmm_seconds": %s, "swap_peak_kib": %d, "uhmm_peak_kib": %d, "ratio": %s}' \
        "$name" "$ram" "$by_swap" "$by_uhmm" "$swap_peak" "$uhmm_peak" "$ratio")")
}

table program ram/MiB swap/s uhmm/s swap-KiB uhmm-KiB ratio
if [ ${#chosen[@]} -eq 0 ]; then
    for name in $programs; do
        if command_of "$name"; then compare "$name"; else echo "run.sh: $name is not installed; left out" >&2; fi
    done
else
    for name in "${chosen[@]}"; do
        command_of "$name" || fail "$name is not installed"
        compare "$name"
    done
fi
if [ $json = yes ]; then
    (IFS=, && printf '[%s]\n' "${results[*]}")
fi
