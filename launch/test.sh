#!/usr/bin/env bash
# Runs the tests: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh --dev
exec .venv/bin/python -m pytest "$@"
