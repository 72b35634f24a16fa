# make demo: install and run the main job.   make test: install and run the tests.   make check: formatting, lint, types.
# make quick: the unit tests and the contract of methods on two small networks, in under a minute.
# make docs: build the documentation into site/; a warning fails it, here and in the tests.
# make lock: write requirements/*.txt, every package with its hashes, from pyproject.toml; KEEP=1 keeps what is installed in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# code is compiled once, not by every process that a test starts
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test quick check docs format lock clean

demo: $(VENV)/.demo
	$(BIN)/modelpatch demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal  # one thread a worker: more only get in each other's way

quick: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -p no:schemathesis -m "not slow and not service and not real"

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python scripts/lock.py $(if $(KEEP),--keep)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml studies/pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --editable ./studies
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) demo site .mypy_cache .pytest_cache .ruff_cache .hypothesis
