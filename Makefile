# Each target does the set-up that it needs in .venv; a second call finds it done.
#   make demo     analyse SmolLM2-135M and write runs/demo.html
#   make test     the test suite
#   make check    linter, formatter, type checker
#   make format   apply the formatter and the linter's safe fixes
#   make clean    remove what the targets made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# The version stands in the lock file alone.
TORCH := $(shell grep '^torch==' requirements.lock)

.PHONY: setup demo test check format clean
.DEFAULT_GOAL := test

setup: $(INSTALLED)

# torch goes first and with its own dependencies: they differ between CPU and CUDA builds, so the lock
# file cannot name them. Everything else is as locked. The stamp is written last, so that a set-up
# that was cut short is taken up again.
$(INSTALLED): pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH)'
	$(PIP) install --no-deps -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

demo: $(INSTALLED)
	$(BIN)/workbench demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -q

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
