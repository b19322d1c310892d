# `make help` lists what there is. Every target sets up what it needs first.
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -ra --durations=10

# A small KV cache, and nothing from the network: the checkpoints of the tests are made on this machine.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full lint format bench clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## make .venv with vLLM (for CUDA where there are GPUs), the tools and this project (3 minutes once)
	@ci/setup.sh --venv $(VENV)

demo: setup ## two ranks on this machine's GPUs, or its CPU: same tokens as plain vLLM, half the experts each
	$(BIN)/python examples/demo.py

test: setup ## unit tests and the shorter tests with a real engine
	$(PYTEST) -v -m "not full"

test-full: setup ## every test: all model families, launchers and failure cases
	$(PYTEST) -v

lint: setup ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## put the code into the style that `make lint` asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## the copy path, then throughput of DWDP beside vLLM's own ways, on this machine (about 10 minutes)
	$(BIN)/python -m ci.bench.data_path
	$(BIN)/python -m ci.bench.two_cores

clean: ## remove caches and made checkpoints; keeps .venv
	rm -rf .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
