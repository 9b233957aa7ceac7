#!/usr/bin/env bash
# Makes .venv with the project's requirements. Does nothing if they are installed already.
#   bash launch/setup.sh          for use on a CPU
#   bash launch/setup.sh --dev    to run the tests as well
#   bash launch/setup.sh --tpu    for a Cloud TPU VM
#   bash launch/setup.sh --cuda   for NVIDIA GPUs (CUDA 12; only the driver must be installed)
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=requirements.txt
accelerator=
compilers=
oracles=
case "${1:-}" in
  "") ;;
  --dev) requirements="requirements-dev.txt"; compilers="requirements-compilers.txt"; oracles="requirements-oracles.txt" ;;
  --tpu) accelerator=tpu ;;
  --cuda) accelerator=cuda12 ;;
  *) echo "launch/setup.sh: unknown argument '$1' (only --dev, --tpu, --cuda)" >&2; exit 2 ;;
esac
PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "launch/setup.sh: Python 3.11 or later is needed, '$PYTHON' is $("$PYTHON" --version 2>&1)" >&2
  exit 2
fi
# On machines with accelerators, data may be in a bucket: the package for gs:// as pyproject.toml has it.
bucket=
[ -z "$accelerator" ] || bucket=$(sed -n 's/^gcs = \["\(.*\)"\]$/\1/p' pyproject.toml)
# The same version of JAX with the accelerator's extra.
jax=$(sed -n "s/^jax\([<>=].*\)/jax[$accelerator]\1/p" requirements.txt)
stamp=.venv/installed-$requirements$accelerator
if [ -f "$stamp" ] && cat requirements.txt "$requirements" $compilers $oracles | cmp -s - "$stamp"; then
  exit 0
fi
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
echo "Installing $requirements into .venv (a few minutes the first time) ..."
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" ${accelerator:+"$jax" "$bucket"} 2> >(grep -v "^WARNING: Location" >&2)
[ -z "$oracles" ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
  -r "$oracles" 2> >(grep -v "^WARNING: Location" >&2)
[ -z "$compilers" ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
  --target .venv/compilers -r "$compilers" 2> >(grep -v "^WARNING: Location" >&2)
cat requirements.txt "$requirements" $compilers $oracles > "$stamp"
