#!/usr/bin/env bash
# Make .venv beside this repository and install the package into it; nothing is done twice.
#   bash scripts/setup.sh [EXTRA ...]        EXTRA: dev, deepspeed, cloud, onnx
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=$(IFS=,; echo "$*")
stamp=.venv/.installed-${extras:-base}
wanted=$(cat pyproject.toml constraints.txt | sha256sum)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

if [ ! -x .venv/bin/python ]; then
    python=""
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" > /dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || { echo "error: Python 3.11 or newer is needed; install it (e.g. apt install python3 python3-venv)" >&2; exit 2; }
    "$python" -m venv .venv || { rm -rf .venv; echo "error: cannot make .venv; on Debian: apt install python3-venv" >&2; exit 2; }
fi
echo "installing into .venv (once; some GB with torch)"
.venv/bin/python -m pip install --quiet -c constraints.txt torch torchvision
.venv/bin/python -m pip install --quiet -c constraints.txt -e ".${extras:+[$extras]}"
echo "$wanted" > "$stamp"
