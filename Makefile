# `make demo`, `make test` and `make bench` work in a fresh clone: they make .venv and install everything into it.
# TORCH=2.15.0 does the same with that release of torch, and the Triton that it brings, in an environment of its own.
# `make gpu` runs with the Python that is there (PYTHON=...), for machines that can install nothing.

PYTHON ?= python3
OUT ?= bench/results
TORCH :=
VENV := .venv$(TORCH:%=-torch-%)
BIN := $(VENV)/bin

.NOTPARALLEL:
.PHONY: demo test lint docs bench gpu clean

$(VENV)/%.done: pyproject.toml setup.py $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[$*]"
	touch $@

$(VENV)/constraints.txt: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),(grep -vE '^(torch|triton)==' $<; echo torch==$(TORCH)),cat $<) > $@

demo: $(VENV)/demo.done
	$(BIN)/python -m bench.demo

test: $(VENV)/test.done
	$(BIN)/python -m pytest -n auto --dist loadgroup --durations 10

bench: $(VENV)/bench.done
	$(BIN)/python -m bench

gpu:
	$(PYTHON) -c "import fusedopt.kernels" 2>/dev/null || ln -s ../kernels fusedopt/kernels
	$(PYTHON) -m bench --gpu-tests --budget 360 --out $(OUT)

lint: $(VENV)/lint.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	cd tests/typed && PYTHONPATH=$(CURDIR) $(CURDIR)/$(BIN)/mypy --strict --explicit-package-bases --config-file= \
		--cache-dir=$(CURDIR)/.mypy_cache/typed user.py

docs: $(VENV)/docs.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv .venv-torch-* build *.egg-info
	test ! -L fusedopt/kernels || rm fusedopt/kernels
