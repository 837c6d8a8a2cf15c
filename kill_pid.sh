#!/usr/bin/env bash
# Stops the run that run_script.sh started in this folder, with every process that it started.
set -u

usage="usage: kill_pid.sh [SECONDS]
       kill_pid.sh --list

Stops the run that run_script.sh recorded in PID_current.txt of the current folder: asks it to end
(SIGTERM), waits until it has saved its checkpoint and ended, kills what is left after SECONDS
(default: 300, because a large model takes time to write), and removes PID_current.txt. Calling it
again while it waits sends a second SIGTERM, at which a training run stops without saving.

--list prints the IDs of the run's processes, one on a line, and stops nothing.

Exit status: 0 stopped, or already ended; 1 something could not be stopped; 2 wrong use."

fail() { # STATUS SENTENCE
    printf 'kill_pid.sh: %s\n' "$2" >&2
    exit "$1"
}

# Prints the living processes of the run whose leader is process $1 as lines "PID PGID". None means
# that the run has ended, or that the system has given its number to another program.
#
# A number alone proves nothing, so each process of a run carries its folder in the environment
# variable IMPROVED_DIFFUSION_RUN. That finds workers even in a session of their own (torchrun and
# mpiexec start theirs so). A worker that changed its environment is found by session and group,
# which count as the run's if one member carries the variable: the system does not give a number
# away while a session or group bears it. Zombies hold nothing and count as ended.
processes_from_proc() {
    local marked
    marked=$(grep -lzxF -e "IMPROVED_DIFFUSION_RUN=$folder" /proc/[0-9]*/environ 2>/dev/null |
        tr -dc '0-9\n' | tr '\n' ' ')
    # /proc/PID/stat: PID (NAME) STATE PARENT GROUP SESSION ...; the name may hold anything.
    cat /proc/[0-9]*/stat 2>/dev/null |
        sed -n 's/^\([0-9]*\) (.*) \([A-Za-z]\) [0-9]* \([0-9]*\) \([0-9]*\) .*/\1 \2 \3 \4/p' |
        awk -v run="$1" -v marked="$marked" '
            BEGIN { split(marked, list, " "); for (i in list) carries[list[i]] = 1 }
            $2 == "Z" || $2 == "X" { next }
            $1 in carries { print $1, $3; if ($3 == run || $4 == run) ours = 1; next }
            $3 == run || $4 == run { unmarked[$1] = $3 }
            END { if (ours) for (pid in unmarked) print pid, unmarked[pid] }'
}

# The same where there is no /proc (macOS, the BSDs): the process group and its descendants, unless
# the leader started after PID_current.txt was written (two seconds are for rounding). A worker in
# another group is found only while its parent lives.
processes_from_ps() {
    local age written
    age=$(ps -o etime= -p "$1" | awk -F'[-:]' '
        { s = $NF + 60 * $(NF - 1) + (NF > 2 ? 3600 * $(NF - 2) : 0) + (NF > 3 ? 86400 * $1 : 0)
          print s }')
    if [ -n "$age" ]; then
        written=$(stat -f %m PID_current.txt 2>/dev/null) || written=$(stat -c %Y PID_current.txt)
        [ $(($(date +%s) - age)) -le $((written + 2)) ] || return 0
    fi
    ps -Ao pid=,ppid=,pgid=,stat= | awk -v run="$1" '
        $4 !~ /^Z/ { parent[$1] = $2; group[$1] = $3; if ($3 == run) ours[$1] = grown = 1 }
        END {
            while (grown) {
                grown = 0
                for (pid in parent)
                    if (!(pid in ours) && parent[pid] in ours) ours[pid] = grown = 1
            }
            for (pid in ours) print pid, group[pid]
        }'
}

# A process can be missed for an instant, while it replaces its program or forks and ends, so that
# nothing is left is only believed when it is seen twice.
processes() {
    local found look=ps
    [ ! -r /proc/self/environ ] || look=proc
    found=$("processes_from_$look" "$1")
    if [ -z "$found" ]; then
        sleep 0.1
        found=$("processes_from_$look" "$1")
    fi
    [ -z "$found" ] || printf '%s\n' "$found"
}

forget() { # removes PID_current.txt, unless a new run has meanwhile been recorded in it
    local now=
    read -r now 2>/dev/null <PID_current.txt
    [ "$now" != "$run" ] || rm -f PID_current.txt ||
        fail 1 "the run has ended, but $folder/PID_current.txt cannot be removed."
}

leader_group_lives() { # so that no group of another program that bears the number is signalled
    awk -v run="$run" '$2 == run { found = 1 } END { exit !found }' <<<"$left"
}

signal_each() { # SIGNAL...
    local pid signal
    while read -r pid _; do
        for signal; do kill -s "$signal" "$pid" 2>/dev/null; done
    done <<<"$left"
}

limit=300
list=
case ${1-} in
    -h | --help) printf '%s\n' "$usage" && exit 0 ;;
    --list) list=yes ;;
    '') [ $# -eq 0 ] || fail 2 "the time limit is empty: give whole seconds." ;;
    *[!0-9]* | ???????*) fail 2 "the time limit must be whole seconds (6 digits), not '$1'." ;;
    *) limit=$((10#$1)) ;;
esac
[ $# -le 1 ] || fail 2 "one argument at most is expected, not $#: see --help."

folder=$(pwd -P)
[ -e PID_current.txt ] || fail 2 "no run is recorded here: there is no $folder/PID_current.txt."
run=
read -r run 2>/dev/null <PID_current.txt
case $run in
    '' | 0* | 1 | *[!0-9]*) fail 2 "$folder/PID_current.txt holds no process ID: remove it." ;;
esac
# Another user's processes cannot be told from those of other programs.
[ -O PID_current.txt ] || [ "$EUID" -eq 0 ] ||
    fail 2 "$folder/PID_current.txt belongs to another user, who alone can stop the run."

left=$(processes "$run")
if [ -n "$list" ]; then
    [ -z "$left" ] || awk '{ print $1 }' <<<"$left"
    exit 0
fi
if [ -z "$left" ]; then
    why="the run with PID $run had already ended"
    ! kill -0 "$run" 2>/dev/null || why="$why, and what has this number now was left alone"
    forget
    printf '%s; removed the stale PID_current.txt.\n' "$why"
    exit 0
fi

# The group is asked first and alone: a launcher in it passes the signal on to workers in groups of
# their own, and a second SIGTERM would keep them from saving. SIGCONT wakes a suspended run.
if leader_group_lives; then
    kill -s TERM -- "-$run" 2>/dev/null
    kill -s CONT -- "-$run" 2>/dev/null
fi
[ ! -t 2 ] || printf 'the run with PID %s has %s s to save and end\n' "$run" "$limit" >&2

SECONDS=0 # bash counts it up, by the clock's whole seconds: -le is never early
orphans_asked=
while left=$(processes "$run") && [ -n "$left" ] && [ "$SECONDS" -le "$limit" ]; do
    # Workers whose launcher is gone can no longer be asked by it.
    if [ -z "$orphans_asked" ] && ! leader_group_lives; then
        orphans_asked=yes
        signal_each TERM CONT
    fi
    sleep 0.2
done
if [ -z "$left" ]; then
    forget
    printf 'the run with PID %s ended %s s after SIGTERM; removed PID_current.txt.\n' \
        "$run" "$SECONDS"
    exit 0
fi

# What forks while it is being killed is found in the next round.
for _ in {1..50}; do
    ! leader_group_lives || kill -s KILL -- "-$run" 2>/dev/null
    signal_each KILL
    sleep 0.1
    left=$(processes "$run")
    [ -n "$left" ] || break
done
if [ -n "$left" ]; then
    left=$(awk '{ printf " %s", $1 }' <<<"$left")
    fail 1 "these processes of the run with PID $run could not be killed:$left."
fi
forget
printf 'the run with PID %s had not ended after %s s and was killed; removed PID_current.txt.\n' \
    "$run" "$limit"
