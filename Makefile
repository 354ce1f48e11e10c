# Each chore is one command, and sets up what it needs. CI calls the same ones.
#
#   make serve [MODEL=… PORT=… ARGS="…"]   an OpenAI-compatible server, of the shipped model if MODEL is left out
#   make test [JOBS=2 TESTS=…]            linters, types, tests (all of them by so many processes); no torch
#   make parity                           logits against transformers (installs torch)
#   make clients                          client libraries in an environment of their own, against the shipped model
#   make agents                           coding agents and clients of npm, with the settings of docs/clients.md
#   make bench-cpu                        against mlx-lm on this CPU, in one run
#   make metal-check                      on a Mac: kernels, parity, overlap, capture, speed, as one report to send
#   make sweep                            the property tests with many more examples, and sweep-models
#   make soak                             the tests under faults at full length: killed engines, churn, canary, disk
#   make sweep-models                     every architecture of mlx-lm; writes the table of docs/models.md
#   make lint   make format   make docs   make wheel   make clean
#
# PYTHON=/path/to/python chooses the interpreter the first time.

MODEL ?=
PORT ?= 30000
ARGS ?=
TESTS ?=
JOBS ?= 2
BIN := .venv/bin
export PYTHON

.PHONY: help serve test lint format parity clients agents bench-cpu metal-check sweep sweep-models soak docs wheel clean setup dev

help:
	@sed -n 's/^#   //p' Makefile

setup:
	@scripts/setup.sh serve

dev:
	@scripts/setup.sh dev

serve: setup
	$(BIN)/pippin serve $(if $(MODEL),--model-path $(MODEL)) --port $(PORT) $(ARGS)

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/python -m pytest $(or $(TESTS),-n $(JOBS) --dist loadfile)

parity:
	@scripts/setup.sh parity
	.venv-parity/bin/python -m pytest -o addopts= -q --strict-markers --strict-config -n $(JOBS) --dist loadfile tests/parity

clients: dev
	@scripts/setup.sh clients
	$(BIN)/python -m pytest -o addopts= -q --strict-markers --strict-config tests/clients

agents: dev
	@scripts/setup.sh agents
	$(BIN)/python -m pytest -o addopts= -q -rs --strict-markers --strict-config tests/agents

bench-cpu: dev
	$(BIN)/python -m benchmarks.cpu $(ARGS)

metal-check: dev
	$(BIN)/python scripts/metal_check.py $(ARGS)

sweep-models: dev
	$(BIN)/python scripts/sweep_models.py $(ARGS)

sweep: sweep-models
	HYPOTHESIS_PROFILE=sweep $(BIN)/python -m pytest --timeout 3600 $(TESTS)

soak: dev
	PIPPIN_SOAK=1 $(BIN)/python -m pytest -s --timeout 7200 $(or $(TESTS),tests/chaos tests/test_canary.py tests/test_disk.py tests/test_kvdisk.py tests/test_kvdisk_windows.py tests/test_odd_configurations.py)

docs: dev
	$(BIN)/python scripts/cli_docs.py
	$(BIN)/python scripts/compatibility.py

wheel: dev
	$(BIN)/python -m pip wheel -q --no-deps -w dist .
	@ls -l dist

clean:
	rm -rf .venv .venv-parity .venv-clients .venv-agents build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
