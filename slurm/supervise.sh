# Sourced by the batch scripts here:  supervise COMMAND...
#
# Runs the command as tasks of Slurm. Warned that its time is up or its place is needed, the run
# saves and leaves with status 75 (try again); the job then asks to be queued again, because one
# that ends by itself within the grace period is not. The next start goes on where this one ended.
supervise() {
    local status warned=
    # srun passes USR1 on to all tasks; TERM it would take for itself, and kill them unwarned.
    trap 'warned=yes; kill -USR1 "$!" 2>/dev/null' USR1 TERM
    # Bash runs no trap while a command is in the foreground, so srun stays behind, and we wait.
    srun "$@" &
    while true; do
        wait "$!"
        status=$?
        # Above 128: a trap ended the waiting, or a signal ended srun.
        [ "$status" -gt 128 ] && kill -0 "$!" 2>/dev/null || break
    done
    # A run that is warned before it listens does not leave in order, but has lost nothing.
    if [ "$status" -eq 75 ] || { [ "$warned" ] && [ "$status" -gt 128 ]; }; then
        echo "job $SLURM_JOB_ID: stopped by its warning; queueing it again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}
