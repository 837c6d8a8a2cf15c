#!/usr/bin/env bash
# Starts a script in the background so that it outlives the terminal; kill_pid.sh stops it.
set -u

usage="usage: run_script.sh SCRIPT [ARGS...]

Starts SCRIPT in the background with nohup, as the leader of its own session and process group. The
current folder receives PID_current.txt (the process ID) and output.txt (what the script prints; an
older one is kept as output_DATE_TIME.txt). One run at a time in a folder; kill_pid.sh stops it.

A .py file is run by \$PYTHON, else by the active virtual environment, else by .venv/bin/python
beside run_script.sh, else by python3; a .sh file by bash; anything else must be executable.

The first 5 seconds (\$RUN_SCRIPT_WATCH, a whole number) are watched: a script that ends in them shows
its last lines here.

Exit status: 0 started; 1 not started; 2 wrong use; the script's own if it ends while watched."

fail() { # STATUS SENTENCE
    printf 'run_script.sh: %s\n' "$2" >&2
    exit "$1"
}

case ${1-} in
    -h | --help) printf '%s\n' "$usage" && exit 0 ;;
    '') fail 2 "no script was named: see --help." ;;
esac
self=$(readlink -f -- "$0" 2>/dev/null) || self=$0
here=$(cd -- "$(dirname -- "$self")" && pwd -P)
folder=$(pwd -P)

script=$1
shift
case $script in */*) ;; *) script=./$script ;; esac # no search in PATH, no name taken for a flag
[ -f "$script" ] || fail 2 "there is no script '$script' (from $folder)."
[ -r "$script" ] || fail 2 "the script '$script' cannot be read."

python=${PYTHON-}
if [ -z "$python" ]; then
    python=python3
    for venv in "${VIRTUAL_ENV:-/nowhere}" "$here/.venv"; do
        [ -x "$venv/bin/python" ] && python=$venv/bin/python && break
    done
fi

case $script in
    *.py)
        command -v -- "$python" >/dev/null || fail 2 "the Python '$python' cannot be run."
        set -- "$python" "$script" "$@"
        ;;
    *.sh) set -- bash "$script" "$@" ;;
    *)
        [ -x "$script" ] || fail 2 "'$script' is neither .py nor .sh nor executable."
        set -- "$script" "$@"
        ;;
esac

# One start at a time in a folder. mkdir is atomic on every file system.
lock=.run_script.lock
until why=$(mkdir "$lock" 2>&1); do
    [ -w . ] || fail 1 "the folder $folder cannot be written to, so nothing was started."
    if [ "$SECONDS" -ge 10 ]; then
        [ -d "$lock" ] || fail 1 "nothing was started: $why."
        fail 1 "another start has held $folder/$lock for 10 s; remove that folder if there is none."
    fi
    sleep 0.1
done
trap 'rmdir "$lock"' EXIT

if [ -e PID_current.txt ]; then
    alive=$("$here/kill_pid.sh" --list) || exit
    read -r recorded <PID_current.txt
    [ -z "$alive" ] ||
        fail 1 "the run with PID $recorded in $folder is still alive; '$here/kill_pid.sh' stops it."
    rm -f PID_current.txt || fail 1 "the stale $folder/PID_current.txt cannot be removed."
    printf 'PID_current.txt was stale: the run with PID %s has ended.\n' "$recorded"
fi

if [ -e output.txt ] || [ -L output.txt ]; then
    kept=output_$(date +%Y%m%d_%H%M%S)
    free=$kept.txt
    for ((number = 1; ; number++)); do
        [ -e "$free" ] || break
        free=${kept}_$number.txt
    done
    mv -- output.txt "$free" ||
        fail 1 "the old $folder/output.txt cannot be renamed, so nothing was started."
fi
: 2>/dev/null >output.txt || fail 1 "$folder/output.txt cannot be written, so nothing was started."

# Each command replaces the one before it, so the process that records its ID is the one that
# becomes the script, and the ID is on disk before the script's first line runs.
record_and_become='set -C; echo "$$" >PID_current.txt || exit 1; set +C; exec "$@"'
set -- bash -c "$record_and_become" run_script.sh "$@"
if command -v setsid >/dev/null; then
    set -- setsid "$@"
else # macOS
    set -- "$python" -c 'import os, sys; os.setsid(); os.execvp(sys.argv[1], sys.argv[1:])' "$@"
fi
# By the first variable kill_pid.sh tells the run's processes from others; the second makes
# output.txt show what happens as it happens.
IMPROVED_DIFFUSION_RUN=$folder PYTHONUNBUFFERED=1 nohup "$@" </dev/null >>output.txt 2>&1 &
pid=$!

# A wrong flag shows itself once the imports are done, and should not have to be looked for in
# output.txt.
until [ -s PID_current.txt ] || ! kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
for ((tenth = 0; tenth < 10 * ${RUN_SCRIPT_WATCH:-5}; tenth++)); do
    if ! kill -0 "$pid" 2>/dev/null; then
        wait "$pid"
        status=$?
        printf '%s ended at once with exit status %s, and printed:\n' "$script" "$status" >&2
        tail -n 20 output.txt >&2
        # Kept for kill_pid.sh if the script left processes behind.
        [ -e PID_current.txt ] && [ -z "$("$here/kill_pid.sh" --list)" ] && rm -f PID_current.txt
        exit "$status"
    fi
    sleep 0.1
done
printf "started %s with PID %s: see %s/output.txt, and stop it with '%s/kill_pid.sh'.\n" \
    "$script" "$pid" "$folder" "$here"
