# `make serve` and `make test` need Python 3.11 or newer, and nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: serve test check format clean

serve: .venv/ready  ## Serve /nix/store, or a demo store where there is none
	@if [ -e /nix/var/nix/db/db.sqlite ]; then exec $(BIN)/harmonia; \
	else $(BIN)/harmonia demo demo-store && exec $(BIN)/harmonia --config demo-store/harmonia.toml; fi

test: check  ## Check the code, then run all tests that can run here
	$(BIN)/pytest

check: .venv/ready  ## Lints, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/ready  ## Mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## Remove what the other targets made
	if [ -e demo-store ]; then chmod -R u+w demo-store; fi
	rm -rf .venv demo-store dist .hypothesis .mypy_cache .pytest_cache .ruff_cache

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
