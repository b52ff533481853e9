#!/bin/sh
# Installs the wheel in $OCTAVO_DIST with extras, "server,otel" or "load", and the pinned versions of what it needs, into
# the virtual environment $OCTAVO_PREFIX, which is made if it is not there.
#
# Runs in the source folder: install-wheel.sh EXTRAS. PIP_ARGS: arguments of pip.
set -eu
extras=$1
prefix=${OCTAVO_PREFIX:-/opt/octavo}
[ -x "$prefix/bin/pip" ] || python3 -m venv "$prefix"
for wheel in "${OCTAVO_DIST:-/tmp/dist}"/octavo-*.whl; do
  # shellcheck disable=SC2086 # several arguments
  "$prefix/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt ${PIP_ARGS:-} \
    "${wheel}[$extras]"
done
