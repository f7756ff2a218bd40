# make demo | make test | make sanitize | make lint | make clean
# PIP_OPTIONS goes to every pip call. A laptop without an NVIDIA card saves gigabytes with the CPU wheel of torch:
#   make demo PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
VENV ?= .venv
PIP_OPTIONS ?=
BIN := $(VENV)/bin

# What the compiled modules are made from: pip's own builds are incremental too.
NATIVE := setup.py $(wildcard csrc/*.py csrc/*.h csrc/cpu/* csrc/cuda/*) kernels/build_info.py

.PHONY: demo test sanitize lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/wireframe demo

# A process a core, and one thread in each: more would wait for each other.
test: $(VENV)/.test
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# The extension's tests against a build with AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/.test
	$(BIN)/python tests/sanitized.py

lint: $(VENV)/.test
	$(BIN)/ruff check .

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit("wireframe needs Python 3.10 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/.demo: pyproject.toml $(NATIVE) | $(VENV)/.created
	$(BIN)/python -m pip install $(PIP_OPTIONS) --editable ".[challenge]"
	touch $@

$(VENV)/.test: pyproject.toml $(NATIVE) | $(VENV)/.created
	$(BIN)/python -m pip install $(PIP_OPTIONS) --editable ".[challenge,test]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build *.egg-info
