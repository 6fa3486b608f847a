#!/usr/bin/env bash
# A Ray cluster for the time of a Slurm allocation, and one `orchestrate` command on it.
#
#   sbatch --nodes=2 cluster/slurm.sh train codelm/tiny --name first-run --runs-dir /shared/runs --workers 2
#
# Submit it where the packages are installed or lie in the current folder. Ahead of the time limit Slurm signals this
# script; the run saves, stops at a step boundary with code 75, and the job is queued again to go on from there.
#SBATCH --job-name=orchestrate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
# To the batch script alone, 300 s ahead: the time of a step, a checkpoint and the last words to MLflow.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

if [ "$#" -eq 0 ]; then
    echo "usage: sbatch cluster/slurm.sh train PRESET --name NAME --runs-dir /shared/runs" >&2
    exit 2
fi
if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] && [ -z "${MLFLOW_TRACKING_URI:-}" ]; then
    echo "note: MLflow's SQLite file is for one node; MLFLOW_TRACKING_URI should name a server" >&2
fi

PYTHON=${PYTHON:-python}
RAY=${RAY:-ray}
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may share a node
steps=()
driver=
signalled=
requeue=

# The token, for the nodes of this job alone: the home directory is on every node.
umask 077
mkdir -p "$HOME/.orchestrate"
token="$HOME/.orchestrate/slurm-$SLURM_JOB_ID.token"
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token" RAY_USAGE_STATS_ENABLED=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # when Ray is told to end here, the run is over

# shellcheck disable=SC2329 # the trap calls it
leave() {
    if [ "${#steps[@]}" -gt 0 ]; then
        kill "${steps[@]}" 2>/dev/null || true
        wait "${steps[@]}" 2>/dev/null || true
    fi
    rm -f "$token"
}
trap leave EXIT

# $1: the command's exit code
finish() {
    if [ "$1" -eq 75 ] && [ -n "$requeue" ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$1"
}

# $1: signal for the command
# shellcheck disable=SC2329 # the traps call it
pass_on() {
    signalled=yes
    if [ -n "$driver" ]; then
        kill -s "$1" "$driver" 2>/dev/null || true
    else
        finish 75 # nothing has begun
    fi
}
trap 'requeue=yes; pass_on USR1' USR1
trap 'pass_on TERM' TERM

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
head_ip=$(getent ahostsv4 "$head" | awk 'NR == 1 { print $1 }')

# $1: node; the rest: how its `ray start` begins
start_ray() {
    local node=$1
    shift
    srun --nodes=1 --ntasks=1 --overlap --nodelist="$node" \
        "$RAY" start "$@" --block --disable-usage-stats --num-cpus="${SLURM_CPUS_PER_TASK:-1}" &
    steps+=("$!")
}
start_ray "$head" --head --node-ip-address="$head_ip" --port="$port" --include-dashboard=false
for node in "${nodes[@]:1}"; do
    start_ray "$node" --address="$head_ip:$port"
done

# The workers' share of CPUs is settled once: all nodes must be there first.
RAY_ADDRESS="$head_ip:$port" "$PYTHON" - "${#nodes[@]}" <<'WAIT' &
import sys, time
import ray

wanted, deadline = int(sys.argv[1]), time.monotonic() + 300
while True:
    try:
        ray.init(logging_level="ERROR")
        break
    except ConnectionError:
        if time.monotonic() > deadline:
            sys.exit("error: the head of the Ray cluster did not come up in 300 s")
        time.sleep(2)
while (there := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"error: {there} of {wanted} nodes came up in 300 s")
    time.sleep(1)
WAIT
wait "$!" # in the background, so that a signal is heard meanwhile

RAY_ADDRESS="$head_ip:$port" "$PYTHON" -m orchestrator "$@" &
driver=$!
code=0
while :; do
    signalled=
    wait "$driver" && answer=0 || answer=$?
    [ "$answer" -eq 127 ] || code=$answer # 127: its code was taken a moment ago
    [ -n "$signalled" ] && [ "$answer" -ne 127 ] || break # `wait` ends with a signal too: then the run goes on
done
finish "$code"
