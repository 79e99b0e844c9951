#!/usr/bin/env bash
# Train on a SLURM cluster for as long as it takes, whatever a job's time limit is:
#   sbatch scripts/slurm.sh --exp_name long                          # train.py with the settings of config.py
#   sbatch --nodes 2 scripts/slurm.sh train_improved.py --preset psnr
# Two minutes before the limit, or when the job is pre-empted, the run saves itself and the job queues up again; it goes on from there.
# A process that dies is started again with all others, up to three times. results/ must lie on a disk that the nodes share.
#SBATCH --job-name=rcan
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:USR1@120
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}" || exit 1
source "${VENV:-.venv}/bin/activate"

script=train.py
case "${1:-}" in *.py) script=$1; shift ;; esac
first=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?is set by sbatch: run this with sbatch}" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node need two ports

# On each node. torchrun hands TERM on to the training and waits 30 seconds for it; it doesn't know USR1, which would end it
task='
  (trap "" USR1; exec torchrun "$@") &
  training=$!
  trap "trap : USR1 TERM; kill -TERM $training" USR1 TERM # once, as a second one would leave without saving
  while kill -0 $training 2>/dev/null; do wait $training; done
  wait $training'

srun bash -c "$task" training --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
  --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:$port" "$script" "$@" &
step=$!
warned=
trap 'trap : USR1 TERM; warned=1; kill -USR1 $step' USR1 TERM # srun hands USR1 on, but ends the step at once at TERM
while kill -0 $step 2>/dev/null; do wait $step; done # which a signal interrupts
wait $step
code=$?
if [ -n "$warned" ] && [ $code -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit $code
