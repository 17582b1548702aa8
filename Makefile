# Everything a developer types. All of it runs in .venv, which `make install` makes from the pins in requirements/.

# The pins were tried on Python 3.11.
PYTHON ?= $(shell if python3.11 -c '' 2>/dev/null; then echo python3.11; else echo python3; fi)
# Extra arguments of pip. Where pip is shown no CPU build of torch, name PyTorch's CPU index here (see `make help`).
PIP_ARGS ?=
BIN := .venv/bin
STAMP := .venv/installed
PINS := requirements/quickstart.txt requirements/tests.txt requirements/lint.txt

.DEFAULT_GOAL := help
.PHONY: help install test lint docs demo bench accuracy clean

help:
	@echo 'make install   .venv with the pinned, tried set of packages (two to three minutes, 2 GB; no compiler, no CUDA)'
	@echo 'make test      the tests            (TESTS=tests/privacy for some of them)'
	@echo 'make lint      ruff and mypy'
	@echo 'make docs      the documentation site, into work_dirs/docs'
	@echo 'make demo      a private training end to end on synthetic data'
	@echo 'make bench     speed and memory beside plain training'
	@echo 'make accuracy  what each method reaches at each epsilon (hours)'
	@echo 'make clean     remove .venv and caches'
	@echo
	@echo 'PYTHON=...     the interpreter for .venv (now: $(PYTHON); the pins were tried on 3.11)'
	@echo 'PIP_ARGS=...   more arguments for pip, e.g. --extra-index-url with PyTorch'"'"'s CPU index'
	@echo 'In an environment that has MMPose already: pip install -e .   (replaces none of its packages)'

install: $(STAMP)

$(STAMP): $(PINS) setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	    sys.exit(f"mmpose_dp needs Python 3.10 or newer, $(PYTHON) is {v[0]}.{v[1]}: make install PYTHON=python3.11") if v < (3, 10) else \
	    v == (3, 11) or print(f"Note: the pins were tried on Python 3.11 and $(PYTHON) is {v[0]}.{v[1]}: a wheel may be missing. " \
	    "If pip fails: make clean install PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check --no-deps $(PIP_ARGS) $(PINS:%=-r %)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import torch' || { echo 'torch does not import: pip took a CUDA build, whose libraries are no part of the pins.' \
	    'Type make clean install PIP_ARGS="--extra-index-url <PyTorch CPU index>",' \
	    'or, on a machine with a GPU, $(BIN)/pip install torch==2.13.0 and then touch $(STAMP)'; exit 1; }
	@$(BIN)/python -W ignore -c 'import mmpose_dp'
	@touch $@

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(TESTS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: install
	$(BIN)/pip install -q --disable-pip-version-check --no-deps $(PIP_ARGS) -r requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

demo: install
	$(BIN)/python tools/demo/demo.py

accuracy: install
	$(BIN)/python tools/benchmarks/accuracy.py

bench: install
	$(BIN)/python tools/benchmarks/performance.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
