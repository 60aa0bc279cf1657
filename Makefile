# Two doors: `make demo` and `make test`. Both bootstrap .venv on first use; nothing outside it is touched.

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
OUT ?= runs/demo
JOBS ?= $(shell nproc)
PY := $(VENV)/bin/python

.PHONY: demo test lint build bench clean

demo: build
	$(PY) -m fastgen demo --out $(OUT)

# as many processes as processors, each of which takes its next tests when it has none left
test: build lint
	$(PY) -m pytest --numprocesses $(JOBS) --dist worksteal

lint: build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: build
	$(PY) -m benchmarks --figures

# An interpreter that has torch already lends it to the environment; otherwise torch is installed, once.
$(PY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastgen needs Python 3.10 or newer")'
	if $(PYTHON) -c 'import torch' 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	$(PY) -m pip install --quiet --upgrade pip

$(VENV)/installed: $(PY) pyproject.toml setup.py
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install --quiet torch==$(TORCH)
	$(PY) -m pip install --quiet 'setuptools>=77' 'pybind11>=2.12' ninja
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

# ninja rebuilds what changed in csrc/ and nothing else
build: $(VENV)/installed
	$(PY) setup.py --quiet build_ext --inplace

clean:
	rm -rf build dist *.egg-info fastgen/_C*.so $(VENV)
