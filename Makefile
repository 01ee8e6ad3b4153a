# make demo    the main job: check, speed and learning on this machine, a few minutes
# make test    the test suite against the installed package, at most 10 minutes on 2 cores
# make test-all  and the long ones: clean installs, sanitizers, fuzzing
#
# `cd .venv`: python -m would import the source tree beside it, where nothing is compiled, not the installed package.
# Everything happens in .venv, which is created on first use. constraints.txt pins what CI uses.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc drsn_kernels -name '*.h' -o -name '*.cpp' -o -name '*.py' | grep -v _build.py) \
           setup.py pyproject.toml CMakeLists.txt
DATA ?=
OUT ?= demo-out
TESTS := $(BIN)/pytest
FUZZ ?=

.PHONY: demo test test-all test-all-only info bench clean

demo: $(VENV)/installed
	cd $(VENV) && bin/python -m drsn_kernels demo --out $(abspath $(OUT)) $(if $(DATA),--data $(abspath $(DATA)))

info: $(VENV)/installed
	cd $(VENV) && bin/python -m drsn_kernels info

test: $(VENV)/installed
	$(TESTS) tests -m "not slow"

test-all: test test-all-only

test-all-only: $(VENV)/installed
	$(TESTS) tests -m slow $(FUZZ)

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.shrinkage

$(VENV)/packages: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch triton numpy pytest pytest-benchmark build pybind11 cmake ninja hypothesis scipy matplotlib tqdm
	touch $@

# Installed, not imported from the source tree: a stale build or a file missing from the package shows at once.
$(VENV)/installed: $(VENV)/packages $(SOURCES)
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
