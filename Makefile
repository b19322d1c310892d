# `make help` lists what there is. Every target sets up what it needs first.
VENV ?= .venv
BIN := $(VENV)/bin
# A second environment, for the release before the newest one; on top of the first where that is for CPU.
VENV_031 ?= .venv-0.31
UNIT_031 := $(addprefix tests/unit/test_,seams.py frozen.py patches.py loader.py graphs.py)
E2E_031 := tests/e2e/test_serve.py $(addprefix tests/e2e/test_offline.py::test_,tokens_and_bytes tampering_is_noticed \
	weights_stay_as_they_were_loaded what_users_call nothing_stays_after_del)
SHORT_E2E_031 := tests/e2e/test_offline.py::test_tokens_and_bytes \
	$(addprefix tests/e2e/test_serve.py::test_,completions_are_the_same_on_every_rank pinned_requests_run_no_forward_elsewhere)
PYTEST_031 := $(VENV_031)/bin/python -m pytest -ra -m "not full"
PYTEST := $(BIN)/python -m pytest -ra --durations=10 --side-by-side

# A small KV cache, and nothing from the network: the checkpoints of the tests are made on this machine.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup setup-031 demo test test-full test-031 test-031-short lint format bench clean

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: ## make .venv with vLLM (for CUDA where there are GPUs), the tools and this project (3 minutes once)
	@ci/setup.sh --venv $(VENV)

demo: setup ## two ranks on this machine's GPUs, or its CPU: same tokens as plain vLLM, half the experts each
	$(BIN)/python examples/demo.py

test: setup ## unit tests and the shorter tests with a real engine
	$(PYTEST) -v -m "not full"

test-full: setup test-031 ## every test: all model families, launchers and failure cases; and test-031
	$(PYTEST) -v

setup-031:
	@DWDP_SETUP=cpu ci/setup.sh --venv $(VENV_031) --vllm 0.31 --over $(VENV)

test-031: setup setup-031 ## on CPU with vLLM 0.31, in a second environment: patches, loader, graphs, offline and serving
	$(PYTEST_031) $(UNIT_031) $(E2E_031)

test-031-short: setup setup-031 ## of these the unit tests, and tokens of LLM and of vllm serve
	$(PYTEST_031) $(UNIT_031) $(SHORT_E2E_031)

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

clean: ## remove caches and made checkpoints; keeps environments
	rm -rf .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './$(VENV_031)/*' -prune -exec rm -rf {} +
