#!/bin/sh
# Make .venv with all that make run and make test need. Usage: sh setup/venv.sh [python]
set -eu
python=${1:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' || {
    echo "setup: needs Python 3.11 or newer; pass another one as: make setup PYTHON=python3.12" >&2; exit 1; }
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    # Debian keeps these two in a package of their own.
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq python3-venv
    else
        echo "setup: this Python has no venv; install it first: sudo apt-get install python3-venv" >&2; exit 1
    fi
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade pip
# torch first and alone: another package's range would take the newest build with gigabytes of CUDA.
.venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/python -m pip install --quiet torch==2.13.0
.venv/bin/python -m pip install --quiet -e '.[all,dev]'
