# Sourced by the batch scripts here:  check DOCTOR...; supervise COMMAND...

# Ends the job if it would fail on this node. A warning that comes meanwhile is left to `supervise`.
warned=
check() {
    local status
    trap 'warned=yes' USR1 TERM
    "$@"
    status=$?
    [ "$status" -eq 0 ] || [ "$warned" ] || exit "$status"
}

# Runs the command as tasks of Slurm. When Slurm warns that the time is up or the node is needed, the
# run saves and exits with status 75 (try again). The job then asks to be requeued, as Slurm does not
# requeue a job that ends by itself within the grace period. The next start resumes the run.
supervise() {
    local status=75
    # srun passes USR1 on to all tasks; on TERM it would kill them without warning.
    trap 'warned=yes; kill -USR1 "$!" 2>/dev/null' USR1 TERM
    if [ -z "$warned" ]; then
        # Bash runs no trap while a foreground command runs, so srun runs in the background.
        srun "$@" &
        while true; do
            wait "$!"
            status=$?
            # Above 128: a trap interrupted the wait, or a signal ended srun.
            [ "$status" -gt 128 ] && kill -0 "$!" 2>/dev/null || break
        done
    fi
    # A run that is warned before it listens is killed, but has lost nothing.
    if [ "$status" -eq 75 ] || { [ "$warned" ] && [ "$status" -gt 128 ]; }; then
        echo "job $SLURM_JOB_ID: stopped by its warning; requeueing it"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}
