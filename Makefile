# One command each: `make demo` or `make test` is enough after a clone; the rest is for developers.
#
#   make demo PYTHON=python3.12                  another interpreter
#   make demo PIP_ARGS="--extra-index-url URL"   arguments of every pip install
#   make bench-cpu BENCH_ARGS=--quick            a first look; bench-gpu likewise

PYTHON ?= python3
PIP_ARGS ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
CHAOS_ARGS ?=
FUZZ_ARGS ?= -max_total_time=60
LOAD_SERVER ?= --model name=llama,num_layers=4,num_q_heads=32,num_kv_heads=8,head_dim=128,max_context=8192,num_blocks=4096
LOAD_ARGS ?= --concurrency 1,2,4,8,16 --prompt-tokens 64:0.5,1024:0.4,4000:0.1 --output-tokens 16-64 --html build/load.html

VENV := .venv
BIN := $(VENV)/bin
DEMO_STAMP := $(VENV)/installed-demo
DEV_STAMP := $(VENV)/installed-dev
BENCH_STAMP := $(VENV)/installed-bench
BENCH_PEERS := openvino libggml-python
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
VERSION := $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)
IMAGE := docker build --file docker/Dockerfile
COMPOSE := docker compose --file docker/compose.yaml
TORCH := $(shell grep '^torch==' constraints.txt)
CPP_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit("Octavo needs Python 3.11 or newer, got %d.%d; name another: make PYTHON=python3.12"
             % sys.version_info[:2])
endef
export CHECK_PYTHON

.PHONY: help demo load chaos fuzz test test-asan test-tsan test-long test-gpu bench-cpu bench-rpc pay-page bench-gpu lint format proto build wheel image image-cuda up down clean compiler-is-there

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: compiler-is-there $(DEMO_STAMP)  ## Serve a real model's decoding on loopback: text, speed, quality.
	$(BIN)/octavo-server build
	$(BIN)/octavo-demo $(DEMO_ARGS)

load: compiler-is-there $(DEV_STAMP)  ## Load test a server on loopback; report in build/.
	$(BIN)/octavo-server build
	$(BIN)/octavo-load --start-server "$(LOAD_SERVER)" $(LOAD_ARGS)

chaos: compiler-is-there $(DEV_STAMP)  ## Break a server and its clients in every way, and check all answers; minutes.
	$(BIN)/octavo-server build
	$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

fuzz: $(DEV_STAMP)  ## Fuzz what the service parses by itself; a minute.
	$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

test: compiler-is-there $(DEV_STAMP)  ## Run all tests.
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-asan: compiler-is-there $(DEV_STAMP)  ## Run the cpu kernel tests under ASan and UBSan.
	$(BIN)/python -m tests.sanitizers.run_kernel_tests $(PYTEST_ARGS)

test-tsan: compiler-is-there $(DEV_STAMP)  ## Drill the cpu backend's threads under TSan.
	$(BIN)/python -m tests.sanitizers.thread_drills

test-long: compiler-is-there $(DEV_STAMP)  ## Run the steps of the images in a scratch prefix, and a short chaos.
	$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

# On a GPU machine: with $(PYTHON) as it is and the packages that it has; nothing is installed.
test-gpu:  ## Run the kernel tests on the GPU that is here, and the sanitizer over some of them.
	PYTHONPATH=.:proto:server:client $(PYTHON) -m tests.bench.run_gpu_tests

bench-cpu: compiler-is-there $(BENCH_STAMP)  ## Benchmark the kernels on the CPU beside their peers; under 8 minutes.
	$(BIN)/python -m tests.bench.cpu $(BENCH_ARGS)

bench-rpc: compiler-is-there $(DEV_STAMP)  ## Benchmark the wire beside the floor of grpcio; under 8 minutes.
	$(BIN)/python -m tests.bench.rpc $(BENCH_ARGS)

pay-page: $(DEV_STAMP)  ## Write docs/when-it-pays.md from the benchmarks' results; bench-rpc does it too.
	$(BIN)/python -m tests.bench.rpc.pay_page

bench-gpu:  ## Benchmark the kernels on the GPU that is here; under 8 minutes.
	$(PYTHON) tests/bench/gpu.py --output build/bench-gpu.json $(BENCH_ARGS)

lint: $(DEV_STAMP)  ## Check style, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/mypy

format: $(DEV_STAMP)  ## Format Python and C++.
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

proto: $(DEV_STAMP)  ## Regenerate the Python code of octavo.proto.
	$(BIN)/python proto/generate.py

build: compiler-is-there $(DEMO_STAMP)  ## Compile the kernels ahead of their first use.
	$(BIN)/octavo-server build --verbose

wheel: $(DEV_STAMP)  ## Build the source distribution and the wheel into dist/.
	$(BIN)/python -m build

image:  ## Build the server's image for CPUs, and the load test's.
	$(IMAGE) --target cpu --tag octavo-server:$(VERSION)-cpu .
	$(IMAGE) --target load --tag octavo-load:$(VERSION) .

image-cuda:  ## Build the server's image for NVIDIA GPUs; needs none.
	$(IMAGE) --target cuda --tag octavo-server:$(VERSION)-cuda .

up:  ## Start a server, Prometheus and Grafana in containers.
	$(COMPOSE) up --build --detach --wait

down:  ## Stop them; the server writes its sessions to their volume.
	$(COMPOSE) down

clean:  ## Remove everything that make made in this folder.
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The demo needs no developer's tools. Whoever installed those has everything of the demo as well.
$(DEMO_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), once; torch first, which is large"
	$(INSTALL) $(PIP_ARGS) $(TORCH)
	$(INSTALL) -c constraints.txt $(PIP_ARGS) -e ".[server,demo]"
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), once; torch first, which is large"
	$(INSTALL) $(PIP_ARGS) $(TORCH)
	$(INSTALL) -c constraints.txt $(PIP_ARGS) -e ".[dev]"
	@touch $(DEMO_STAMP) $@

# A peer that cannot be installed is left out of the benchmark, and tried again next time.
$(BENCH_STAMP): pyproject.toml constraints.txt $(DEMO_STAMP)
	$(INSTALL) -c constraints.txt $(PIP_ARGS) matplotlib
	@is_whole=1; for peer in $(BENCH_PEERS); do \
	  $(INSTALL) -c constraints.txt $(PIP_ARGS) --only-binary $$peer $$peer \
	    || { is_whole=; echo "the benchmark goes on without $$peer"; }; \
	done; [ -z "$$is_whole" ] || touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "Octavo needs Python 3.11 or newer, and there is no $(PYTHON); name one: make PYTHON=python3.12"; \
	  exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

compiler-is-there:
	@command -v "$${CXX:-c++}" >/dev/null || { \
	  echo "Octavo compiles its kernels, and there is no $${CXX:-c++}; on Debian: apt-get install g++"; \
	  exit 1; }
