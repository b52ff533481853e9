#!/bin/sh
# Fails unless the server runs as it will in the image: check.sh [--cuda-arch all].
#
# There is no compiler and no nvcc, so that `build` takes the kernels that were compiled ahead, and loads them.
set -eu
for compiler in c++ g++ cc nvcc; do
  if command -v "$compiler"; then
    echo "check.sh: the image has a compiler" >&2
    exit 1
  fi
done
octavo-server --version
octavo-server build "$@"
