# make demo    the main job: check, speed and learning on this machine, a few minutes
# make test    the test suite against the installed package, on all cores; JOBS=1: on one
# make test-all  and the long ones: of the cases that make test leaves out another part each day (PART=N: that one,
#              PART=: all but the sweep's), clean installs, sanitizers, fuzzing
# make experiments  the networks on real data under noise, hours; resumable; VIBRATION=, SPEECH=, IMAGE= name the folders,
#              EXPERIMENTS="--jobs 2 --quick ..." the rest; without a folder simulated vibration
# make pictures  docs/pictures, a few minutes; VIBRATION= and IMAGE= name the folders, PICTURES="--quick ..." the rest
# make train-example  recordings made by numpy, a network trained on them, predictions of new ones; half a minute
# make bench   the benchmarks, about an hour; BENCH=--quick: a few minutes
# make lint    ruff, and the workflows in .github against their schema and zizmor
# make gpu     everything that needs a GPU: tests, sanitizers, benchmarks, in 8 minutes; leaves gpu-report/report.md;
#              GPU="--minutes 30 --only bench" and the like: python -m benchmarks.gpu_suite --help
#
# `cd .venv`: python -m would import the source tree beside it, where nothing is compiled, not the installed package.
# Everything happens in .venv, which is created on first use. constraints.txt pins what CI uses; another set of versions:
# make clean test CONSTRAINTS=FILE.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc drsn_kernels -name '*.h' -o -name '*.cpp' -o -name '*.py' | grep -v _build.py) \
           setup.py pyproject.toml CMakeLists.txt
DATA ?=
OUT ?= demo-out
TRAIN_OUT ?= train-example-out
BENCH ?=
BENCH_OUT ?= bench-out
VIBRATION ?=
SPEECH ?=
IMAGE ?=
EXPERIMENTS ?=
PICTURES ?=
GPU ?=
CONSTRAINTS ?= constraints.txt
JOBS ?= auto
TESTS := $(BIN)/pytest tests -n $(JOBS)
FUZZ ?=
PART ?= $(shell echo $$(($$(date +%s) / 86400)))
# Packages are installed without byte code, and a hundred Pythons that the tests start would each compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo train-example test test-all test-all-only info bench experiments pictures lint gpu clean

demo: $(VENV)/installed
	cd $(VENV) && bin/python -m drsn_kernels demo --out $(abspath $(OUT)) $(if $(DATA),--data $(abspath $(DATA)))

train-example: $(VENV)/installed
	$(BIN)/python examples/own_data.py --out $(abspath $(TRAIN_OUT))

info: $(VENV)/installed
	cd $(VENV) && bin/python -m drsn_kernels info

test: $(VENV)/installed
	$(TESTS) --dist worksteal -m "not slow"

test-all: test test-all-only

test-all-only: $(VENV)/installed
	$(TESTS) --dist loadgroup -m slow $(if $(PART),--part $(PART)) $(FUZZ)

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks --out $(abspath $(BENCH_OUT)) $(BENCH)

experiments: $(VENV)/installed
	$(BIN)/python -m experiments.run $(if $(VIBRATION),--vibration "$(VIBRATION)") $(if $(SPEECH),--speech "$(SPEECH)") \
	  $(if $(IMAGE),--image "$(IMAGE)") $(if $(VIBRATION)$(SPEECH)$(IMAGE),,--simulated) $(EXPERIMENTS)

pictures: $(VENV)/installed
	$(BIN)/python -m experiments.pictures $(if $(VIBRATION),--vibration "$(VIBRATION)") \
	  $(if $(IMAGE),--image "$(IMAGE)") $(PICTURES)

lint: $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/zizmor --offline .github

gpu: OUT := gpu-report
gpu: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu_suite --out $(abspath $(OUT)) $(GPU)

# Of their own: linting and the site need no torch.
$(VENV)/linters: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt ruff check-jsonschema zizmor
	touch $@

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# Without compiling to byte code: of torch's files most are never imported.
$(VENV)/packages: $(CONSTRAINTS) pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --no-compile -c $(CONSTRAINTS) torch triton numpy pytest pytest-benchmark pytest-xdist build pybind11 cmake ninja hypothesis scipy h5py matplotlib tqdm scikit-learn onnx onnxruntime onnxscript mypy
	touch $@

$(VENV)/wheel: $(SOURCES) | $(BIN)/pip
	rm -rf $@
	$(BIN)/pip wheel --quiet --no-deps -w $@ .

# Installed, not imported from the source tree: a stale build or a file missing from the package shows at once.
# The compiler and pip run beside each other: 180 s of set-up become 120 on two cores.
$(VENV)/installed: $(CONSTRAINTS) $(SOURCES)
	$(MAKE) --no-print-directory -j2 $(VENV)/packages $(VENV)/wheel
	$(BIN)/pip install --quiet --no-deps --force-reinstall $(VENV)/wheel/*.whl
	touch $@

.PHONY: numbers site
# The figures of the stored runs into README.md and docs/, and their plots again.
numbers: $(VENV)/installed
	$(BIN)/python -m benchmarks.pages

# The documentation as a site, in site/.
site: $(VENV)/mkdocs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/mkdocs: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "mkdocs-material>=9.5"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
