#!/bin/sh
# Installs the C++ compiler of a Debian system. Only the build stages run this: no image of the server has a compiler.
set -eu
apt-get update --quiet
apt-get install --yes --quiet --no-install-recommends g++
rm -rf /var/lib/apt/lists/*
