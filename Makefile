# Needs git, make and Python >= 3.11; everything else goes into .venv.
# Another Python: make PYTHON=/path/to/python3.12 demo

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; \
	done; echo python3)
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --no-input --disable-pip-version-check
# --verifytypes finds packages through the python on the PATH, and not by --pythonpath.
PYRIGHT := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" PYTHONPATH="$(CURDIR)" basedpyright
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.PHONY: help
help: ## what can be made
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile

.PHONY: demo
demo: $(VENV)/.core ## run the main job on synthetic images
	$(RUN) -m cpseg demo

.PHONY: test
test: $(VENV)/.dev ## all tests and the examples in docstrings, on as many cores as there are
	$(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: lint
lint: $(VENV)/.dev ## ruff: rules and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

.PHONY: types
types: $(VENV)/.dev ## mypy, and pyright of the package: both strict
	$(RUN) -m mypy
	MYPYPATH=benchmarks/evidence $(RUN) -m mypy benchmarks/evidence
	MYPYPATH=benchmarks $(RUN) -m mypy benchmarks/*.py examples/*.py
	$(PYRIGHT) --level error

.PHONY: verifytypes
verifytypes: $(VENV)/.dev ## whether every public name has a type that all checkers agree on
	$(PYRIGHT) --verifytypes cpseg --ignoreexternal

.PHONY: docs
docs: $(VENV)/.dev ## the pages and their examples, warnings as errors
	$(RUN) -m sphinx -q -E -n -W --keep-going -b html docs docs/_build/html
	$(RUN) -m sphinx -q -E -n -W --keep-going -b doctest docs docs/_build/doctest

.PHONY: bench
bench: $(VENV)/.peers ## speed beside TorchCP and MAPIE, scaling, memory: an hour, to benchmarks/results/
	PYTHONPATH=$(VENV)/peers $(RUN) benchmarks/speed.py
	$(RUN) benchmarks/scaling.py

.PHONY: guarantee
guarantee: $(VENV)/.dev ## print the validity table and write it to the docs: minutes
	$(RUN) benchmarks/guarantee.py | tee docs/explanation/validity-table.md

.PHONY: develop
develop: $(VENV)/.dev ## the environment alone

.PHONY: clean
clean: ## remove the environment and all that was built
	rm -rf $(VENV) build dist docs/_build docs/reference/generated *.egg-info \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis
	find cpseg tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes in alone and by its exact version, so that what follows finds it and leaves it be.
# It brings setuptools, which then builds cpseg itself (--no-build-isolation): no second download.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "PYTHON must be Python 3.11 or newer; got $(PYTHON) = $$($(PYTHON) --version 2>&1 | \
		tail -n 1). Name another: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	$(PIP) install -c constraints.txt $(TORCH)
	@touch $@

$(VENV)/.core: pyproject.toml $(VENV)/.torch
	$(PIP) install -c constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.core
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev,plot,data,hf,nifti,train,export]'
	@touch $@

# Beside the environment, not in it: only the benchmarks see them, and numpy and torch stay ours.
$(VENV)/.peers: $(VENV)/.dev
	rm -rf $(VENV)/peers
	$(PIP) install --no-deps --target $(VENV)/peers torchcp==1.2.1 mapie==1.6.0 \
		scikit-learn==1.9.1 joblib==1.6.0 cloudpickle==3.1.3 threadpoolctl==3.8.0 \
		narwhals==2.29.0
	@touch $@
