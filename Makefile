# Two commands do everything on a fresh machine: make run, make test. Both set up .venv first.
PYTHON ?= python3
RECIPE ?= tiny
BIN := .venv/bin

.PHONY: setup system run test check prove format reference

setup: .venv/.stamp

.venv/.stamp: pyproject.toml setup/venv.sh
	sh setup/venv.sh $(PYTHON)
	@touch $@

system:
	sh setup/system_packages.sh

run: setup
	$(BIN)/rorqual run $(RECIPE) $(ARGS)

test: setup system
	$(BIN)/python -m pytest -m "not gpu and not slow" -n 2 --dist loadfile $(ARGS)

check: setup
	$(BIN)/ruff format --check rorqual tests benchmarks
	$(BIN)/ruff check rorqual tests benchmarks
	$(BIN)/codespell rorqual tests benchmarks docs README.md LOG.md
	$(BIN)/pyright
	$(BIN)/python tests/ledger.py
	$(BIN)/python -m pytest -q tests/test_floors.py

format: setup
	$(BIN)/ruff format rorqual tests benchmarks
	$(BIN)/ruff check --fix rorqual tests benchmarks

reference: setup
	$(BIN)/python docs/make_reference.py

prove: setup system
	$(BIN)/python -m benchmarks.prove $(ARGS)
