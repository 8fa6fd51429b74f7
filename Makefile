# The law of this file: every target works on a bare machine with Python 3.11+ and make, and uses .venv alone.

PYTHON ?= python3
BIN := .venv/bin
# Torch's CPU threads spin at barriers by default; two processes that do so on a small machine stall each other.
export OMP_WAIT_POLICY ?= passive

.PHONY: install demo grpo serve test thorough fleet check clients coverage docs wheel bench clean

install: .venv/installed ## make .venv with everything, exact versions

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "myserve needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[server,dev]'
	$(BIN)/python -m compileall -q src # where Python may write no bytecode, every start would compile: 1.6 s
	$(BIN)/python -m myserve.engine.kernels.warm
	@touch $@

demo: install ## serve the embedded model, sample from it, show the result (ONCE=1: then end)
	$(BIN)/python -m myserve.cli.demo $(if $(ONCE),--once)

grpo: install ## reinforcement learning on the embedded model, a few minutes: runs/grpo/curve.svg (ARGS: the script's options)
	$(BIN)/python examples/grpo.py $(ARGS)

serve: install ## serve MODEL (default: the embedded model) on PORT
	$(BIN)/myserve serve $(MODEL) --port $(or $(PORT),8000)

check: install ## formatting, lint, types, the laws of the house
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: check ## check, then all tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --ignore tests/cluster/on_ray

thorough: install ## the proofs of `make test` on more models, types and draws
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile -m thorough tests

fleet: install ## the tests of a fleet on a real Ray, which takes both cores of a small machine: alone
	$(BIN)/python -m pytest tests/cluster/on_ray

clients: install ## other clients' packages, in .venv-clients, against our server (CLIENTS=--optional: if they can be had)
	$(BIN)/python -m tools.clients $(CLIENTS)

coverage: install ## all tests, and which lines no test reached: by module, below 100 %
	$(BIN)/python -m pytest --cov --cov-report=term --numprocesses auto --dist loadfile --ignore tests/cluster/on_ray
	$(BIN)/python -m coverage html -q -d build/coverage

docs: install ## the pages as a site in build/site; a link that leads nowhere ends it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

wheel: install ## the wheel in empty environments: the SDK alone, then with [server] (needs the package registry)
	$(BIN)/python -m tools.wheel --server

bench: install ## ours and the peers at hand, ratios in one run
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .venv-clients build dist
