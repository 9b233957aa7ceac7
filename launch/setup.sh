#!/usr/bin/env bash
# Makes .venv with what the project needs. Does nothing, quietly, when that is already there.
#   bash launch/setup.sh          to use it
#   bash launch/setup.sh --dev    to run the tests as well
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=requirements.txt
case "${1:-}" in
  "") ;;
  --dev) requirements=requirements-dev.txt ;;
  *) echo "launch/setup.sh: unknown argument '$1' (only --dev)" >&2; exit 2 ;;
esac
PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "launch/setup.sh: Python 3.11 or later is needed, '$PYTHON' is $("$PYTHON" --version 2>&1)" >&2
  exit 2
fi
stamp=.venv/installed-$requirements
if [ -f "$stamp" ] && cat requirements.txt "$requirements" | cmp -s - "$stamp"; then
  exit 0
fi
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
echo "Installing $requirements into .venv (a few minutes at the first time) ..."
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" 2> >(grep -v "^WARNING: Location" >&2)
cat requirements.txt "$requirements" > "$stamp"
