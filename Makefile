# `make demo` and `make test` are all the set-up there is: each makes .venv, installs into it and runs.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Two test processes with one thread each are faster than one process with two, and torch's threads do not spin.
WORKERS ?= 2

.PHONY: demo test lint format docs clean
.DELETE_ON_ERROR:

# `make demo ARGS=--resume` goes on with an interrupted one.
demo: $(INSTALLED)
	$(BIN)/python -m hgc_learn demo $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages of docs/ as a site in build/docs; any warning is an error.
docs: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict --site-dir build/docs

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and by its exact version: a CPU build of it is taken where pip finds one. Nothing is compiled before it is
# imported: most of it never is.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e ".[train,canny,policies,dev]"
	touch $@
