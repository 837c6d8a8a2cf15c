#!/usr/bin/env bash
# Stops the run that run_script.sh started in this folder, with every process that it started.
set -u
export LC_ALL=C # a process name cut in the middle of a character is no text elsewhere

usage="usage: kill_pid.sh [SECONDS]
       kill_pid.sh --list

Stops the run that run_script.sh recorded in PID_current.txt of the current folder: asks it to end
(SIGTERM), waits until it has saved its checkpoint and ended, kills what is left after SECONDS
(default: 300, because a large model takes time to write), and removes PID_current.txt. Calling it
again while it waits sends a second SIGTERM, at which a training run stops without saving.

The processes that torchrun or mpiexec started are asked themselves: their launcher would give them
less time.

--list prints the IDs of the run's processes, one on a line, and stops nothing.

Exit status: 0 stopped, or already ended; 1 something could not be stopped; 2 wrong use."

fail() { # STATUS SENTENCE
    printf 'kill_pid.sh: %s\n' "$2" >&2
    exit "$1"
}

# See run_script.sh.
lock_folder() {
    { exec 9<.; } 2>/dev/null || return
    if command -v flock >/dev/null; then
        flock -w 30 9 2>/dev/null || [ $? -ne 1 ] # other errors: a file system without locks
    else # macOS
        perl -e '$SIG{ALRM} = sub { exit 1 }; alarm 30;
            open my $folder, "<&=", 9 or exit 1; exit !flock $folder, 2'
    fi
}

# Which processes are the run's: its number alone proves nothing, since the system gives it to
# another program once the run has ended. So each of its processes carries "RUN:FOLDER" in the
# environment variable IMPROVED_DIFFUSION_RUN, even in a session of its own, where torchrun and
# mpiexec start theirs. Those that changed their environment are found as members of the run's
# sessions and as children of its processes, and are then remembered by number and birth. What still
# prints to output.txt is found even if its folder was renamed or its parent is gone, unless it
# belongs to its parent's session, as what somebody started in a terminal does.

# Prints a line "mark PID RUN:FOLDER" for each process that was marked by any run, and a line
# "prints PID" for each one that prints to output.txt.
evidence_from_proc() {
    local stream pid
    grep -azH '^IMPROVED_DIFFUSION_RUN=' /proc/[0-9]*/environ 2>/dev/null | tr '\0' '\n' |
        sed -n 's|^/proc/\([0-9]*\)/environ:IMPROVED_DIFFUSION_RUN=|mark \1 |p'
    for stream in /proc/[0-9]*/fd/[12]; do
        if [ "$stream" -ef output.txt ]; then
            pid=${stream#/proc/}
            echo "prints ${pid%%/*}"
        fi
    done
}

# Prints a line "PID STATE PARENT GROUP SESSION BIRTH NAME" for each process.
table_from_proc() {
    local three='\( [0-9]*\)\{3\}' fifteen='\( [-0-9]*\)\{15\}'
    # /proc/PID/stat is PID (NAME) STATE PARENT GROUP SESSION, 15 numbers, BIRTH and so on.
    cat /proc/[0-9]*/stat 2>/dev/null |
        sed -n "s/^\([0-9]*\) (\(.*\)) \([A-Za-z]$three\)$fifteen \([0-9]*\) .*/\1 \3 \6 \2/p"
}

# Where there is no /proc (macOS, the BSDs), the leader is believed to be the run's unless it
# started after PID_current.txt was written (two seconds are for rounding), and groups take the
# place of sessions.
evidence_from_ps() {
    local age written
    age=$(ps -o etime= -p "$run" | awk -F'[-:]' '
        { s = $NF + 60 * $(NF - 1) + (NF > 2 ? 3600 * $(NF - 2) : 0) + (NF > 3 ? 86400 * $1 : 0)
          print s }')
    if [ -n "$age" ]; then
        written=$(stat -f %m PID_current.txt 2>/dev/null) || written=$(stat -c %Y PID_current.txt)
        [ $(($(date +%s) - age)) -le $((written + 2)) ] || return 0
    fi
    ps -Ao pid=,pgid= | awk -v run="$run" '$2 == run { print "prints", $1 }'
}
table_from_ps() {
    ps -Ao pid=,stat=,ppid=,pgid=,lstart=,ucomm= |
        awk '{ print $1, $2, $3, $4, $4, $5 "_" $6 "_" $7 "_" $8 "_" $9, $10 }'
}

# Puts the run's living processes into $left as lines "PID GROUP ROLE PID:BIRTH", where ROLE tells
# launchers and their workers. None means that the run has ended. Zombies hold nothing and count as
# ended. A process can be missed for an instant, while it replaces its program or forks and ends,
# so that nothing is left is only believed when it is seen twice.
system=ps
[ ! -r /proc/self/environ ] || system=proc
left=
groups= # of the last processes seen, each after a minus sign
look() {
    local known
    known=$(awk '{ print $4 }' <<<"$left")
    groups=$(awk 'NF { print "-" $2 }' <<<"$left" | sort -u)
    left=$(members "$known")
    if [ -z "$left" ]; then
        sleep 0.1
        left=$(members "$known")
    fi
    [ -n "$left" ]
}

members() { # KNOWN
    { "evidence_from_$system"; "table_from_$system"; } | run=$run folder=$folder known=$1 awk '
        BEGIN {
            run = ENVIRON["run"]
            count = split(ENVIRON["known"], list, " ")
            for (i = 1; i <= count; i++) remembered[list[i]] = 1
            launcher = "^(mpiexec|mpirun|hydra_|prte|orte|pt_elastic|torchrun)"
        }
        $1 == "prints" { prints[$2] = 1; next }
        $1 == "mark" { pid = $2; sub(/^mark [0-9]* /, ""); mark[pid] = $0; next }
        $2 ~ /^[ZX]/ { next }
        { parent[$1] = $3; group[$1] = $4; session[$1] = $5; birth[$1] = $1 ":" $6; name[$1] = $7 }
        END {
            own[run ":" ENVIRON["folder"]] = 1
            for (pid in prints)
                if (session[pid] == run && mark[pid] ~ "^" run ":") own[mark[pid]] = 1 # renamed
            for (pid in parent)
                if (birth[pid] in remembered || mark[pid] in own || mark[pid] == "" && \
                    pid in prints && (session[pid] == run || session[pid] != session[parent[pid]]))
                    ours[pid] = sessions[session[pid]] = 1
            do {
                grown = 0
                for (pid in parent) {
                    if (pid in ours || mark[pid] != "" && !(mark[pid] in own)) continue
                    if (!(parent[pid] in ours || session[pid] in sessions)) continue
                    ours[pid] = sessions[session[pid]] = grown = 1
                }
            } while (grown)
            for (pid in ours) {
                role = "-"
                if (parent[pid] in ours && name[parent[pid]] ~ launcher) role = "worker"
                if (name[pid] ~ launcher) role = "launcher"
                print pid, group[pid], role, birth[pid]
            }
        }'
}

ids() { # [ROLE]: the processes' IDs, one on a line
    awk -v role="${1-}" 'role == "" || $3 == role { print $1 }' <<<"$left"
}

leader_group_lives() { # so that no group of another program that bears the number is signalled
    awk -v run="$run" '$2 == run { found = 1 } END { exit !found }' <<<"$left"
}

# Asks processes to end that have not been asked yet; SIGCONT wakes suspended ones. A second
# SIGTERM would keep a training run from saving.
asked=
ask() { # PID...
    local pid new=
    for pid; do
        case " $asked " in *" $pid "*) ;; *) new="$new $pid" ;; esac
    done
    [ -n "$new" ] || return 0
    asked="$asked$new"
    kill -s TERM $new 2>/dev/null
    kill -s CONT $new 2>/dev/null
}

forget() { # removes PID_current.txt, unless a new run has meanwhile been recorded in it
    local now=
    lock_folder
    read -r now 2>/dev/null <PID_current.txt
    [ "$now" != "$run" ] || rm -f PID_current.txt 2>/dev/null ||
        fail 1 "the run has ended, but $folder/PID_current.txt cannot be removed."
    exec 9<&-
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
folder=$(pwd -P 2>/dev/null) || fail 2 "the current folder has been deleted."
folder=${folder//$'\n'/?}

# A start that is under way is waited for, so that its run is stopped rather than missed.
[ -n "$list" ] || { lock_folder; exec 9<&-; }
[ -e PID_current.txt ] || fail 2 "no run is recorded here: there is no $folder/PID_current.txt."
# Another user's processes cannot be told from those of other programs.
[ -O PID_current.txt ] || [ "$EUID" -eq 0 ] ||
    fail 2 "$folder/PID_current.txt belongs to another user, who alone can stop the run."
run=
[ ! -f PID_current.txt ] || read -r run 2>/dev/null <PID_current.txt
case $run in
    '' | 0* | 1 | *[!0-9]*) fail 2 "$folder/PID_current.txt holds no process ID: remove it." ;;
esac

if [ -n "$list" ]; then
    look && ids
    exit 0
fi
if ! look; then
    why="the run with PID $run had already ended"
    if "table_from_$system" | grep -q "^$run [^ZX]"; then
        why="$why, and what has this number now was left alone"
    fi
    forget
    printf '%s; removed the stale PID_current.txt.\n' "$why"
    exit 0
fi
! ids | grep -qx "$$" || fail 2 "the run cannot stop itself by kill_pid.sh: call it from outside."
[ ! -t 2 ] || printf 'the run with PID %s has %s s to save and end\n' "$run" "$limit" >&2

# The leader's group is asked first and alone: a program in it may pass the signal on to others.
# Launchers are asked last, because torchrun kills its workers 30 s after SIGTERM and Open MPI's
# mpiexec at once; they end with their workers.
if [ -n "$(ids launcher)" ]; then
    ask $(ids worker) $(awk -v run="$run" '$2 == run && $3 == "-" { print $1 }' <<<"$left")
elif leader_group_lives; then
    asked=$(awk -v run="$run" '$2 == run { print $1 }' <<<"$left" | tr '\n' ' ')
    kill -s TERM -- "-$run" 2>/dev/null
    kill -s CONT -- "-$run" 2>/dev/null
fi

SECONDS=0 # bash counts it up, by the clock's whole seconds: -le is never early
workless=0
while look && [ "$SECONDS" -le "$limit" ]; do
    ask $(ids worker)
    # A launcher that stays without workers, as while it starts, is asked after all.
    workless=$((workless + 1))
    [ -z "$(ids worker)" ] || workless=0
    [ "$workless" -lt 15 ] || ask $(ids launcher)
    # Workers whose launcher is gone can no longer be asked by it.
    leader_group_lives || [ -n "$(ids launcher)" ] || ask $(ids)
    sleep 0.2
done
if [ -z "$left" ]; then
    kill -s KILL -- $groups 2>/dev/null # what is never seen, because it forks and ends all the time
    forget
    printf 'the run with PID %s ended %s s after SIGTERM; removed PID_current.txt.\n' \
        "$run" "$SECONDS"
    exit 0
fi

# What forks while it is being killed is found in the next round, and whole groups at once.
for _ in {1..50}; do
    kill -s KILL -- $(awk '{ print $1, "-" $2 }' <<<"$left") 2>/dev/null
    sleep 0.1
    look || break
done
if [ -n "$left" ]; then
    left=$(ids | tr '\n' ' ')
    fail 1 "these processes of the run with PID $run could not be killed: ${left% }."
fi
forget
printf 'the run with PID %s had not ended after %s s and was killed; removed PID_current.txt.\n' \
    "$run" "$limit"
