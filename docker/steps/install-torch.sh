#!/bin/sh
# Makes the virtual environment $OCTAVO_PREFIX with the pinned torch, the large part, which changes seldom.
#
# Runs in the source folder. PIP_ARGS: arguments of pip, such as the index of torch's CPU builds.
set -eu
prefix=${OCTAVO_PREFIX:-/opt/octavo}
python3 -m venv "$prefix"
torch=$(grep '^torch==' constraints.txt)
# shellcheck disable=SC2086 # several arguments
"$prefix/bin/python" -m pip install --quiet --disable-pip-version-check ${PIP_ARGS:-} "$torch"
