#!/bin/bash
# Every GPU of this machine:           DATA=data/imagenet RUN=runs/b2 bash docs/clusters/torchrun.sh
# Of several, the same on each, with   NODES=4 RENDEZVOUS=first-machine:29500
# RECIPE names the recipe; what follows the script are its overrides, such as --train.shard True.
set -euo pipefail
: "${DATA:?the directory that selftrans prepare made}" "${RUN:?a directory for the run, on a disk that all machines see}"

# RESTARTS: how often processes are started anew after one has died; they continue from the last checkpoint. They meet at a
# store of their own, since restarted processes at times wait for ever at the one they would share with torchrun.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
  --nnodes "${NODES:-1}" --nproc-per-node "${PROCESSES:-gpu}" --max-restarts "${RESTARTS:-0}" \
  --rdzv-backend c10d --rdzv-endpoint "${RENDEZVOUS:-localhost:0}" \
  -m selftrans train "${RECIPE:-sit_imagenet_b2}" --data "$DATA" --out "$RUN" "$@"
