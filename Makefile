# make test   build, check style and types, run all tests          make demo   compress and measure a real model
# make lint   ruff alone         make types   mypy alone           make clean  remove what these made
#
# Both use virtual environments of their own (.venv, .venv-light), filled from constraints.txt by PYTHON (3.11), and
# nothing of the system's Python packages. A second call reuses what has not changed.

PYTHON ?= python3
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: test demo lint types pytest clean

unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_CONSTRAINT PIP_TARGET PIP_USER
export PYTHONNOUSERSITE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

VENV := .venv
LIGHT := .venv-light
BIN := $(VENV)/bin
WHEELS := build/wheels
SOURCES := $(shell find src csrc -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml README.md LICENSE
INSTALL := -m pip install --quiet --constraint constraints.txt
# Requirements out of pyproject.toml: those of the package itself, and of the extras named.
REQUIRES := -c 'import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *(r for e in sys.argv[1:] for r in p["optional-dependencies"][e]))'

test: lint types pytest

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

types: $(VENV)/.tools
	$(BIN)/mypy

pytest: $(VENV)/.lowtide $(LIGHT)/.lowtide
	LOWTIDE_LIGHT_PYTHON=$(CURDIR)/$(LIGHT)/bin/python $(BIN)/python -m pytest -q

demo: $(VENV)/.lowtide
	$(BIN)/python examples/demo.py

clean:
	rm -rf $(VENV) $(LIGHT) build demo .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Everything but the light floor. The build tools are in it, too, so that the package is built without isolation: an
# isolated build would fetch tools that constraints.txt does not pin.
$(VENV)/.tools: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "constraints.txt is for Python 3.11: make PYTHON=python3.11")'
	@echo "installing the tools into $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python $(INSTALL) $$($(BIN)/python $(REQUIRES) compress dev)
	@touch $@

$(WHEELS)/.built: $(VENV)/.tools $(SOURCES)
	@echo "building lowtide"
	@rm -rf $(WHEELS)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(WHEELS) .
	@touch $@

$(VENV)/.lowtide: $(WHEELS)/.built
	@$(BIN)/python $(INSTALL) --no-deps --force-reinstall $(WHEELS)/lowtide-*.whl
	@touch $@

# The light floor: what `pip install lowtide` gives, without torch. `pip check` proves that nothing is missing.
$(LIGHT)/.tools: pyproject.toml constraints.txt
	@echo "installing the light floor into $(LIGHT)"
	@$(PYTHON) -m venv --clear $(LIGHT)
	@$(LIGHT)/bin/python $(INSTALL) $$($(LIGHT)/bin/python $(REQUIRES))
	@touch $@

$(LIGHT)/.lowtide: $(WHEELS)/.built $(LIGHT)/.tools
	@$(LIGHT)/bin/python $(INSTALL) --no-deps --force-reinstall $(WHEELS)/lowtide-*.whl
	@$(LIGHT)/bin/python -m pip check --quiet
	@touch $@
