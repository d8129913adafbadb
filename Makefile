# make demo    set up, build, and train the date translator
# make test    set up, build, and run the tests, several at a time (one by one: ARGS="-n 0")
# make bench   set up, build, and print the speed report
# make peers   install the packages whose attention layers the speed report compares with
# make targets set up, build, and hold the performance targets against the machine's limits (ARGS="--grid --json FILE")
# make build   set up and build: seconds after a change to a kernel
# make lint    ruff and clang-format, as they stand in the environment
# make gpu-check, on a machine with a GPU: build, tests, sanitizers, training steps and speed in one report under benchmarks/results (needs no network)
#
# PYTHON names the interpreter to start from. If it has a PyTorch of 2.11 or later, .venv reuses it, so that a machine with PyTorch and
# the packages below needs no network; otherwise TORCH is installed.

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
CXX_SOURCES := $(shell find csrc benchmarks tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')
# Where packages are: those of a PYTHON that is a virtual environment are not the system's.
PACKAGES := import sysconfig; print(*map(sysconfig.get_path, ("platlib", "purelib")), sep="\n")
HAS_TORCH := import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))

.PHONY: demo test bench peers targets gpu-check build lint clean

demo: build
	$(PY) examples/translate_dates.py $(ARGS)

test: build
	$(PY) -m pytest -n logical --maxprocesses 4 --dist worksteal $(ARGS)

bench: build
	$(PY) -m pytest --benchmark $(ARGS)

peers: $(VENV)/ready
	$(PIP) install --no-deps -r benchmarks/packages.txt

targets: build
	$(PY) -m benchmarks.targets $(ARGS)

# With PYTHON's own packages: where there is a GPU, there may be no network.
gpu-check:
	@$(PYTHON) -m benchmarks.gpu_check $(ARGS)

build: $(VENV)/ready
	@mkdir -p build
	@echo "Building the extension (two or three minutes the first time; the log is build/log)"
	@$(PY) setup.py build_ext --inplace > build/log 2>&1 || { tail -n 40 build/log; exit 1; }
	@grep '^attn_ext:' build/log

# The editable install builds too; build_ext, after it, finds nothing left to do.
$(VENV)/ready: setup.py pyproject.toml
	@if [ ! -x $(PY) ]; then \
	  if $(PYTHON) -c '$(HAS_TORCH)' 2> /dev/null; then \
	    echo "Creating $(VENV) on $(PYTHON) with its PyTorch"; $(PYTHON) -m venv --system-site-packages $(VENV) && \
	    $(PYTHON) -c '$(PACKAGES)' > $$($(PY) -c '$(PACKAGES)' | tail -n 1)/outer.pth; \
	  else \
	    echo "Creating $(VENV) on $(PYTHON) with $(TORCH)"; $(PYTHON) -m venv $(VENV); \
	  fi; \
	fi
	@$(PY) -c '$(HAS_TORCH)' 2> /dev/null || $(PIP) install '$(TORCH)'
	$(PIP) install 'setuptools>=70' wheel ninja
	@echo "Installing attn_ext and what its tests and examples need (builds the extension: two or three minutes)"
	$(PIP) install --no-build-isolation --editable '.[test,benchmarks,examples]'
	@touch $@

lint: $(VENV)/ready
	$(PIP) install --no-build-isolation --editable '.[lint]'
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)

clean:
	rm -rf build dist *.egg-info attn_ext/*.so
