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

Exit status: 0 started; 2 not started, and why; the script's own if it ends while watched."

fail() { # SENTENCE
    printf 'run_script.sh: %s\n' "$1" >&2
    exit 2
}

case ${1-} in
    -h | --help) printf '%s\n' "$usage" && exit 0 ;;
    '') fail "no script was named: see --help." ;;
esac
watch=${RUN_SCRIPT_WATCH:-5}
case $watch in
    *[!0-9]* | ???????*) fail "RUN_SCRIPT_WATCH must be whole seconds (6 digits), not '$watch'." ;;
esac
self=$(readlink -f -- "$0" 2>/dev/null) || self=$0
here=$(cd -- "$(dirname -- "$self")" && pwd -P)
folder=$(pwd -P 2>/dev/null) || fail "the current folder has been deleted."

script=$1
shift
case $script in */*) ;; *) script=./$script ;; esac # no search in PATH, no name taken for a flag
[ -f "$script" ] || fail "there is no script '$script' (from $folder)."
[ -r "$script" ] || fail "the script '$script' cannot be read."

python=${PYTHON-}
if [ -z "$python" ]; then
    python=python3
    for venv in "${VIRTUAL_ENV:-/nowhere}" "$here/.venv"; do
        [ -x "$venv/bin/python" ] && python=$venv/bin/python && break
    done
fi

case $script in
    *.py)
        command -v -- "$python" >/dev/null || fail "the Python '$python' cannot be run."
        set -- "$python" "$script" "$@"
        ;;
    *.sh) set -- bash "$script" "$@" ;;
    *)
        [ -x "$script" ] || fail "'$script' is neither .py nor .sh nor executable."
        set -- "$script" "$@"
        ;;
esac

# One start at a time in a folder. The folder itself is locked, which leaves no file behind, and the
# system takes the lock from processes that die. kill_pid.sh has the same lines.
lock_folder() {
    { exec 9<.; } 2>/dev/null || return
    if command -v flock >/dev/null; then
        flock -w 30 9 2>/dev/null || [ $? -ne 1 ] # other errors: a file system without locks
    else # macOS
        perl -e '$SIG{ALRM} = sub { exit 1 }; alarm 30;
            open my $folder, "<&=", 9 or exit 1; exit !flock $folder, 2'
    fi
}

[ -r . ] && [ -w . ] || fail "the folder $folder cannot be written to, so nothing was started."
lock_folder || fail "another start in $folder has not ended for 30 s, so nothing was started."

if [ -e PID_current.txt ]; then
    alive=$("$here/kill_pid.sh" --list) || exit 2
    read -r recorded <PID_current.txt
    [ -z "$alive" ] ||
        fail "the run with PID $recorded in $folder is still alive; '$here/kill_pid.sh' stops it."
    rm -f PID_current.txt 2>/dev/null || fail "the stale $folder/PID_current.txt cannot be removed."
    printf 'PID_current.txt was stale: the run with PID %s has ended.\n' "$recorded"
fi

# Complete when it takes its name, so that a full disk leaves no half-written one.
partial=.PID_current.partial
{ (echo "$$" >"$partial"); } 2>/dev/null
writable=$?
rm -f "$partial"
[ "$writable" -eq 0 ] || fail "$folder/PID_current.txt cannot be written, so nothing was started."
if [ -e output.txt ] || [ -L output.txt ]; then
    kept=output_$(date +%Y%m%d_%H%M%S)
    free=$kept.txt
    for ((number = 1; ; number++)); do
        [ -e "$free" ] || [ -L "$free" ] || break
        free=${kept}_$number.txt
    done
    mv -- output.txt "$free" 2>/dev/null ||
        fail "the old $folder/output.txt cannot be renamed, so nothing was started."
fi
: 2>/dev/null >output.txt || fail "$folder/output.txt cannot be written, so nothing was started."

# Each command replaces the one before it, so the process that records its ID is the one that
# becomes the script. By the variable, which is in its environment before its ID is on disk,
# kill_pid.sh tells the run's processes from others. The lock is kept until the ID is on disk, even
# if run_script.sh is killed, and the script's first line runs after that.
mark='export IMPROVED_DIFFUSION_RUN="$$:$0"; exec "$@"'
record="echo \$\$ >$partial && mv -f $partial PID_current.txt || { rm -f $partial; exit 1; }
exec 9<&-; exec \"\$@\""
set -- bash -c "$mark" "${folder//$'\n'/?}" bash -c "$record" run_script.sh "$@"
if command -v setsid >/dev/null; then
    set -- setsid "$@"
else # macOS
    set -- "$python" -c 'import os, sys; os.setsid(); os.execvp(sys.argv[1], sys.argv[1:])' "$@"
fi
# The variable makes output.txt show what happens as it happens.
PYTHONUNBUFFERED=1 nohup "$@" </dev/null >>output.txt 2>&1 &
pid=$!
exec 9<&-

# A wrong flag shows itself once the imports are done, and should not have to be looked for in
# output.txt.
until [ -s PID_current.txt ] || ! kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
for ((tenth = 0; tenth < 10 * 10#$watch; tenth++)); do
    if ! kill -0 "$pid" 2>/dev/null; then
        wait "$pid"
        status=$?
        printf '%s ended at once with exit status %s, and printed:\n' "$script" "$status" >&2
        tail -n 20 output.txt >&2
        # Kept for kill_pid.sh if the script left processes behind.
        if lock_folder && read -r recorded 2>/dev/null <PID_current.txt; then
            [ "$recorded" != "$pid" ] || [ -n "$("$here/kill_pid.sh" --list)" ] ||
                rm -f PID_current.txt
        fi
        exit "$status"
    fi
    sleep 0.1
done
printf "started %s with PID %s: see %s/output.txt, and stop it with '%s/kill_pid.sh'.\n" \
    "$script" "$pid" "$folder" "$here"
