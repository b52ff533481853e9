#!/bin/sh
# Compiles the kernels ahead, into $OCTAVO_CACHE_DIR: build-kernels.sh [--cuda-arch all].
#
# They run on every CPU of the architecture: which instructions are used is decided where the server runs.
set -eu
prefix=${OCTAVO_PREFIX:-/opt/octavo}
OCTAVO_CACHE_DIR=${OCTAVO_CACHE_DIR:-$prefix/cache}
export OCTAVO_CACHE_DIR
"$prefix/bin/octavo-server" build "$@"
# The server's user only reads.
chmod -R a+rX "$OCTAVO_CACHE_DIR"
