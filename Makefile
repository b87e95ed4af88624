# Needs python3 (3.11 or newer), pip, git and make; everything else goes into .venv.
PYTHON3 ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
# Touched when an installation has succeeded, so that a broken one is done again.
STAMP := $(VENV)/.installed
# More words for the command, say: make run ARGS="--recipe digits --dry_run", make test ARGS="-m 'not slow'"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help run test quality style results clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

run: $(STAMP)  ## compress the default model on handwritten digits, from dense to checkpoint (ARGS="..." for more)
	$(PYTHON) scripts/run_nose.py $(ARGS)

test: $(STAMP)  ## run the test suite on two cores (ARGS="..." goes to pytest)
	$(PYTHON) -m pytest -n 2 --dist loadfile $(ARGS)

quality: $(STAMP)  ## check style, format and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy hf_nose

style: $(STAMP)  ## mend style and format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

results: $(STAMP)  ## write the generated parts of README.md and of the results from the committed JSON and the files
	$(PYTHON) scripts/render_results.py
	$(PYTHON) scripts/benchmark.py render
	$(PYTHON) scripts/render_pages.py

clean:  ## remove caches and build leftovers; .venv and runs/ stay
	rm -rf build dist hf_nose.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

$(STAMP): requirements-dev.txt constraints.txt pyproject.toml
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON3) is Python " + sys.version.split()[0] + ": 3.11 or newer is needed, say make PYTHON3=python3.12 ...")'
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@
