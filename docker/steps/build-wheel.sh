#!/bin/sh
# Builds the wheel of the source folder, where it runs, into $OCTAVO_DIST.
#
# PIP_ARGS: arguments of pip.
set -eu
dist=${OCTAVO_DIST:-/tmp/dist}
# shellcheck disable=SC2086 # several arguments
python3 -m pip wheel --quiet --disable-pip-version-check ${PIP_ARGS:-} --no-deps --wheel-dir "$dist" .
