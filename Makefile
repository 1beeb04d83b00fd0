# `make serve` and `make test` need Python 3.11 or newer, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
# How long `make fuzz` looks.
SECONDS ?= 60

.PHONY: serve demo test test-slow quick check format test-versions docs fuzz audit bench soak attack vm-test clean help

# Where it listens, like :8080 or 127.0.0.1:8080: port 5000 of all addresses.
BIND ?=
SERVE = serve $(if $(BIND),--bind '$(BIND)')
serve: .venv/ready  ## Serve /nix/store, or a demo store if there is none, at BIND=:5000
	@if [ -e /nix/var/nix/db/db.sqlite ]; then exec $(BIN)/harmonia $(SERVE); else exec $(MAKE) --no-print-directory demo; fi

demo: .venv/ready  ## Serve a demo store, at BIND=:5000
	@$(BIN)/harmonia demo demo-store && echo "It is being served now. Ctrl-C ends that." && \
	exec $(BIN)/harmonia --config demo-store/harmonia.toml $(SERVE)

test: check  ## Check the code, then run all tests that can run here
	$(BIN)/pytest --numprocesses=auto --dist=worksteal

test-slow: .venv/ready  ## Run the slow tests, which `make test` skips
	$(BIN)/pytest --slow -m slow

# Tests that need no programs, no privileges and few servers.
QUICK := tests/nix tests/fuzz tests/server/test_http.py $(addprefix tests/test_, $(addsuffix .py, \
  address_filter benchmarks config layers publish_policy rate single_flight support))
quick: .venv/ready  ## Run the fast tests: of formats, settings and HTTP
	$(BIN)/pytest --numprocesses=auto --dist=worksteal -m 'not nix and not newer_nix and not root and not browser' $(QUICK)

# treefmt.toml names the tools. All but nixfmt come with .venv.
TREEFMT := PATH="$(CURDIR)/$(BIN):$$PATH" treefmt --allow-missing-formatter

check: .venv/ready  ## Check lints, formatting and types; fail if `make format` changes anything
	$(TREEFMT) --ci
	@command -v nixfmt >/dev/null || echo 'check: nixfmt is not installed, so Nix files are unchecked' >&2
	$(BIN)/mypy

format: .venv/ready  ## Format Python, Nix and shell, and mend what ruff can mend
	$(TREEFMT)

# Which of them: `lowest`, `nixpkgs`.
VERSIONS ?= lowest nixpkgs
test-versions: .venv/ready  ## Test with the lowest versions of all dependencies, and with those of nixpkgs
	$(BIN)/pip install --quiet uv
	.ci/test-versions $(BIN)/uv '$(VERSIONS)' $(QUICK)

docs: .venv/ready  ## Write the documents that follow from the code
	PYTHONPATH=tests $(BIN)/python -m support.generated

# For SECONDS each, another way each time, or from a SEED. Which of tests/fuzz/targets: all.
SEED ?= 0
TARGETS ?=
fuzz: .venv/ready  ## Look for bytes that our readers take wrongly
	$(BIN)/pip install --quiet --editable '.[fuzz]'
	PYTHONPATH=tests $(BIN)/python -m fuzz.run $(SECONDS) $(SEED) $(TARGETS)

audit: .venv/ready  ## Ask whether what we depend on is known to be vulnerable
	$(PYTHON) -m venv .audit
	.audit/bin/pip install --quiet pip-audit
	$(BIN)/pip list --format freeze --exclude-editable >.audit/versions
	.audit/bin/pip-audit --no-deps --disable-pip --progress-spinner off --format json -r .audit/versions 2>.audit/log \
	  | $(PYTHON) .ci/audit.py

# What `make bench` is to measure, and how: nothing is all of it. `--short` takes two minutes, `--docs` writes into docs.
BENCH ?=
bench: .venv/ready  ## Measure against nginx and Nix, as far as they are installed (docs/explanation/benchmarks.md)
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/python -m benchmarks $(BENCH)

soak: MINUTES ?= 5
soak: .venv/ready  ## As root, with Nix: 1,000 clients, builds, garbage collections, workers killed, for MINUTES=5
	PYTHONPATH=tests $(BIN)/python -m benchmarks.soak $(MINUTES)

# Which of them: all. With less than 10 MINUTES, in a small form.
ATTACKS ?=
attack: MINUTES ?= 25
attack: .venv/ready  ## Attack a server in every way known, and measure what other clients notice, for MINUTES=25
	PYTHONPATH=tests $(BIN)/python -m benchmarks.attack $(MINUTES) $(ATTACKS)

# Which of them: all. `VM_TEST_QEMU=1`: some in virtual machines, too.
TESTS ?=
vm-test: export NIXPKGS := $(NIXPKGS)
vm-test: .venv/ready  ## As root, run the NixOS tests between containers
	$(BIN)/python nixos-tests/lab/run.py $(if $(VM_TEST_QEMU),--qemu) $(TESTS)

help:  ## Tell what there is to make
	@sed -n 's/^\([a-z-]*\):.*  ## /\1 /p' Makefile | while read -r name does; do printf '%-10s%s\n' "$$name" "$$does"; done

clean:  ## Remove what the other targets made
	if [ -e demo-store ]; then chmod -R u+w demo-store; fi
	rm -rf .venv .versions .audit bench-results demo-store dist .fuzz .hypothesis .mypy_cache .pytest_cache .ruff_cache

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo '$(PYTHON) is no Python 3.11 or newer; name one: make $(or $(MAKECMDGOALS),serve) PYTHON=python3.11' >&2; exit 1; }
	@echo 'Downloading from PyPI, into .venv, what pyproject.toml names: about a minute, once'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
