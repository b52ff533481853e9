#!/bin/sh
# Installs nvcc and what it compiles with from its Python packages into $NVCC_PREFIX; CUDA_HOME is $NVCC_PREFIX/cuda.
#
# Runs in the source folder. PIP_ARGS: arguments of pip.
set -eu
prefix=${NVCC_PREFIX:-/opt/nvcc}
python3 -m venv "$prefix"
# shellcheck disable=SC2086 # several arguments
"$prefix/bin/python" -m pip install --quiet --disable-pip-version-check ${PIP_ARGS:-} --requirement docker/nvcc.txt
for folder in "$prefix"/lib/python3.*/site-packages/nvidia/cu13; do
  ln -sfn "$folder" "$prefix/cuda"
  ln -sfn lib "$folder/lib64" # where nvcc looks for what it links
done
"$prefix/cuda/bin/nvcc" --version
