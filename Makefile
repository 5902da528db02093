# `make demo` and `make test` work in a fresh clone: they make .venv and install everything into it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

$(VENV)/%.done: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

demo: $(VENV)/demo.done
	$(BIN)/python -m bench.demo

test: $(VENV)/test.done
	$(BIN)/python -m pytest -n auto --dist loadgroup --durations 10

lint: $(VENV)/lint.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
