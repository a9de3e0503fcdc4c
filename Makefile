# Set-up is `make demo` and `make test`; they need Python 3.10 to 3.13 and make.
#
#   PYTHON         the interpreter to make .venv with ("make clean" first, to change it)
#                      make test PYTHON=python3.12
#   PIP_FLAGS      more flags for pip. A smaller download on a machine without an NVIDIA GPU:
#                      make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   PYTEST_FLAGS,
#   BENCH_FLAGS,
#   MATRIX_FLAGS   are passed on
#                      make test PYTEST_FLAGS="-k cache"

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

# Isolated builds read the same constraints; pip 25.3 took a second variable for them.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MODULAR_TELEMETRY_ENABLED := 0
# Compiled artifacts stay in the working tree, so that a later run is quick.
export WHISPER_MAX_CACHE_DIR ?= $(CURDIR)/.cache/whisper_max

.PHONY: demo test bench matrix gpu-compile lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(RUN) -m whisper_max.demo

test: $(VENV)/.installed-test
	$(RUN) -m pytest $(PYTEST_FLAGS)

bench: $(VENV)/.installed-bench
	$(RUN) -m benchmarks $(BENCH_FLAGS)

matrix: $(VENV)/.installed-dev
	$(RUN) -m compat.matrix $(MATRIX_FLAGS)

gpu-compile: $(VENV)/.installed-bench
	$(RUN) -m benchmarks gpu-compile $(BENCH_FLAGS)

lint: $(VENV)/.installed-dev
	$(RUN) -m flake8

clean:
	rm -rf $(VENV) .cache .tox .pytest_cache .hypothesis build dist *.egg-info

# One stamp per extra: a second make installs nothing, a changed setup.cfg installs again.
INSTALL = $(RUN) -m pip install --quiet $(PIP_FLAGS)
PACKAGING := setup.cfg pyproject.toml constraints.txt

$(VENV)/.installed: $(PACKAGING) | $(RUN)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-%: $(PACKAGING) | $(RUN)
	$(INSTALL) --editable ".[$*]"
	@touch $@

$(RUN):
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
