# The programs that the scripts here run; `here` and `work` are set by who reads this. Not a command by itself.

programs='sort dict bytes sqlite xz node threads'

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

# What runs as $1, in "${command[@]}"; an error if this machine does not have it.
command_of() {
    case $1 in
        sort)
            [ -f "$work/numbers" ] || seq 3000000 >"$work/numbers"
            command=(sort -r -S 1G -T "$work" "$work/numbers")
            ;;
        dict | bytes)
            # The interpreter itself: what is found first may be a script that looks for it.
            python=${python:-$(python3 -c 'import sys; print(sys.executable)')} || return 1
            command=("$python" "$here/programs/$1.py")
            ;;
        sqlite) command=(sqlite3 -batch :memory: ".read $here/programs/index.sql") ;;
        xz)
            [ -f "$work/text" ] || seq -f '%.0f cold pages come back when touched' 100000 >"$work/text"
            command=(xz -6 --threads=1 --stdout "$work/text")
            ;;
        node) command=(node "$here/programs/buffers.js") ;;
        threads)
            [ -x "$work/threads" ] || rustc --edition 2024 -O -o "$work/threads" "$here/programs/threads.rs" || return 1
            command=("$work/threads")
            ;;
        own) command=("${own[@]}") ;;
    esac
    command -v "${command[0]}" >/dev/null
}

# The most that one process of "$@" has resident, in KiB.
peak_kib() {
    python3 - "$@" <<'PYTHON'
import resource, subprocess, sys

subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
PYTHON
}

# The same in MiB, of a program by itself.
natural() {
    local kib
    kib=$(peak_kib "$@") && echo $((kib >> 10))
}

# Seconds that "$@" took, by the clock; its output goes to the file $1.
timed() {
    local output=$1 start end
    shift
    start=$(date +%s.%N)
    "$@" >"$output" || return 1
    end=$(date +%s.%N)
    awk -v a="$start" -v b="$end" 'BEGIN { printf "%.2f", b - a }'
}

# The middle of the numbers "$@".
median() {
    printf '%s\n' "$@" | sort -n | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'
}
