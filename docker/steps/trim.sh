#!/bin/sh
# Removes from the virtual environment $OCTAVO_PREFIX what only compiling and installing need: headers, pip.
set -eu
prefix=${OCTAVO_PREFIX:-/opt/octavo}
# A package that is a link belongs to another environment: find does not follow it.
find -P "$prefix/lib" -type d \( -path '*/site-packages/torch/include' -o -path '*/site-packages/torch/share' \
  -o -path '*/site-packages/torch/test' -o -path '*/site-packages/pip' \) \
  -prune -exec rm -r {} +
# torch does not start without its torch_shm_manager.
find -P "$prefix/lib" -type f \( -name '*.a' -o -path '*/site-packages/torch/bin/*' ! -name torch_shm_manager \) \
  -exec rm {} +
