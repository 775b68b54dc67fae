# make demo: train on the bundled model and look at before and after.  make test: the tests, WORKERS at once.
PYTHON ?= python3
# More workers than cores: many tests wait for a process or an answer.
WORKERS ?= 3
BIN := .venv/bin

.PHONY: demo test test-python lint docs clean

# Installing builds the pages, so they are a part of what the environment is made from.
WEB := $(shell find web -name node_modules -prune -o -name dist -prune -o -type f ! -name types.d.ts -print)

.venv/.%: pyproject.toml hatch_build.py $(WEB)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

demo: .venv/.cpu
	$(BIN)/simpletuner train --example chroma-nano.peft-lora

test: .venv/.cpu,test
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

# The tests that need no torch, under another Python: make test-python VERSION=3.12
test-python:
	.ci/test-python "$(VERSION)"

lint: .venv/.cpu,dev
	$(BIN)/ruff check src tests recipes benchmarks
	$(BIN)/ruff format --check src tests recipes benchmarks
	$(BIN)/mypy

docs: .venv/.cpu
	$(BIN)/python -m simpletuner.config.docs

clean:
	rm -rf .venv .venv-* build dist
