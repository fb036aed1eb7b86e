#!/bin/bash
# On the GPUs that accelerate.yaml names:   DATA=data/imagenet RUN=runs/b2 bash docs/clusters/accelerate.sh
set -euo pipefail
: "${DATA:?the directory written by selftrans prepare}" "${RUN:?a directory for the run}"

exec accelerate launch --config_file "$(dirname "$0")/accelerate.yaml" \
  -m selftrans train "${RECIPE:-sit_imagenet_b2}" --data "$DATA" --out "$RUN" "$@"
