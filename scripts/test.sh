#!/usr/bin/env bash
# From a fresh machine to the whole test suite: install, lint, types, tests.
#   bash scripts/test.sh [--full] [pytest arguments]      --full: also the tests marked slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH"

marker=(-m "not slow and not gpu")
if [ "${1:-}" = "--full" ]; then
    marker=()
    shift
fi
ruff check .
ruff format --check .
basedpyright --warnings
python -m pytest "${marker[@]}" "$@"
