#!/usr/bin/env bash
# All checks, from nothing but Python: bash scripts/run_tests.sh [what pytest takes]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare_environment requirements-dev.txt

ruff check .
ruff format --check .
mypy
python -m pytest -m "" -n 2 "$@"
