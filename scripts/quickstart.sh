#!/usr/bin/env bash
# From a fresh machine to a measured, exported encoder: install, pack the built-in digits, pretrain with MAE, judge.
#   bash scripts/quickstart.sh [key=value ...]      e.g. run.dir=runs/second seed=1
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
cd "$root"
export PATH="$root/.venv/bin:$PATH"
exec accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no pipelines/pretrain_mae.py "$@"
