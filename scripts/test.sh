#!/usr/bin/env bash
# From a fresh machine to the whole test suite: install, lint, types, tests.
#   bash scripts/test.sh [--full] [pytest arguments]      --full: also the tests marked slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH"

marker="not slow and not gpu"
if [ "${1:-}" = "--full" ]; then
    marker="not no_such_mark"
    shift
fi
ruff check .
ruff format --check .
basedpyright --warnings
if [ $# -gt 0 ]; then
    python -m pytest -m "$marker" "$@"
else
    # two at a time, then alone those that start processes themselves
    python -m pytest -n 2 --dist loadfile -m "($marker) and not processes"
    python -m pytest -m "($marker) and processes"
fi
