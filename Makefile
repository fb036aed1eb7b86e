# make help | quickstart | test | fast | ranges | lint | format | docs | clean
# Everything is installed into .venv once, and again when pyproject.toml or constraints.txt changes.
# Another Python: make test PYTHON=python3.12        Options for pip: environment variables PIP_...

PYTHON ?= python3
PY := .venv/bin/python
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install --quiet --quiet --no-input --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test fast ranges lint format docs clean distclean

help:  ## show these lines
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

quickstart: .venv/installed  ## the complete method on real digits: CPU, minutes; writes a table and report.html
	@.venv/bin/selftrans quickstart

test: .venv/installed-dev  ## all tests
	@$(PY) -m pytest --numprocesses auto --dist loadfile

fast: .venv/installed-dev  ## all tests but the slow ones
	@$(PY) -m pytest --numprocesses auto --dist loadfile -m "not slow"

ranges: .venv/installed-dev  ## a part of the tests with the lowest, then the newest, versions that pyproject.toml allows (gigabytes)
	@$(PY) tests/ranges.py lowest
	@$(PY) tests/ranges.py newest

lint: .venv/installed-dev  ## ruff (rules and format) and mypy
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy

format: .venv/installed-dev  ## rewrite the code in the project's format
	@$(PY) -m ruff check --fix-only --exit-zero
	@$(PY) -m ruff format

docs: .venv/installed-dev  ## the documentation site, in site/ (tests/integration/test_site.py builds it, too)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "open site/index.html; with the search: python -m http.server --directory site"

clean:  ## remove caches and build output
	@rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## also remove .venv
	@rm -rf .venv

# A .venv without a working pip (an interrupted installation, a removed Python) is made again.
.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "selftrans needs Python 3.11 or newer, and '$(PYTHON)' is not: try 'make PYTHON=python3.12 ...'" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@touch $@

.venv/installed: pyproject.toml constraints.txt | .venv/created
	@echo "installing selftrans into .venv (about 3 minutes, once)"
	@$(PIP) --editable .
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/created
	@echo "installing selftrans and its test tools into .venv (about 3 minutes, once)"
	@$(PIP) --editable '.[dev]'
	@touch .venv/installed $@
