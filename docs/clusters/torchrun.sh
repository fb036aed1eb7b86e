#!/bin/bash
# On every GPU of this machine:                     DATA=data/imagenet RUN=runs/b2 bash docs/clusters/torchrun.sh
# On several machines, the same on each, also with  NODES=4 RENDEZVOUS=first-machine:29500
# RECIPE names the recipe. Arguments of the script are settings of the recipe, such as --train.shard True.
set -euo pipefail
: "${DATA:?the directory written by selftrans prepare}" "${RUN:?a directory for the run, on a disk that all machines see}"

# RESTARTS: how often all processes are restarted after one has failed; they continue from the last checkpoint. They use their
# own rendezvous store: restarted processes sometimes hang at the store that they would share with torchrun.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
  --nnodes "${NODES:-1}" --nproc-per-node "${PROCESSES:-gpu}" --max-restarts "${RESTARTS:-0}" \
  --rdzv-backend c10d --rdzv-endpoint "${RENDEZVOUS:-localhost:0}" \
  -m selftrans train "${RECIPE:-sit_imagenet_b2}" --data "$DATA" --out "$RUN" "$@"
