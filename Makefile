# Two commands do everything, with all set-up included: `make demo` and `make test`.
# PYTHON picks the interpreter (3.11 or newer); everything else comes from pip, into .venv.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/ready
	$(BIN)/moeware demo

test: .venv/ready
	$(BIN)/pytest -n 2 --dist loadscope

lint: .venv/ready
	$(BIN)/pip install --quiet ruff
	$(BIN)/ruff check .

# torch first and by its exact version: a range would let pip choose a build many times as large.
.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moeware needs Python 3.11 or newer, not " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[build,test]'
	touch $@

clean:
	rm -rf .venv build
