# `make serve` and `make test` need only Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
# Duration of `make fuzz`, for each target.
SECONDS ?= 60

# A container may forbid Python to keep compiled modules. Then each process that a test starts compiles all of them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: serve demo test test-slow quick check format test-versions docs pictures fuzz audit bench soak attack vm-test seaweedfs clean help

# Has axe-core, which finds barriers for people in pages. Without its dependencies: Playwright, which we do not use.
AXE := axe-playwright-python==0.1.8

# Address to listen on, like :8080 or 127.0.0.1:8080. Default: port 5000 on all addresses.
BIND ?=
AT = $(if $(BIND),--bind '$(BIND)')
serve: .venv/ready  ## Serve /nix/store, or a demo store if there is none, at BIND=:5000
	@if [ -e /nix/var/nix/db/db.sqlite ]; then exec $(BIN)/harmonia serve $(AT); else exec $(MAKE) --no-print-directory demo; fi

demo: .venv/ready  ## Serve a demo store, at BIND=:5000
	@$(BIN)/harmonia demo $(AT) demo-store && echo "Serving it now; Ctrl-C stops the server." && \
	exec $(BIN)/harmonia --config demo-store/harmonia.toml serve $(AT)

test: check  ## Check the code, then run all tests that this machine supports
	$(BIN)/pytest --numprocesses=auto --dist=worksteal

test-slow: .venv/ready  ## Run slow tests, tests with Nix 2.26 and 2.34, and more examples of each property
	$(BIN)/pytest --numprocesses=auto --dist=worksteal --slow --hypothesis-profile=many \
	  -m 'slow or newer_nix or hypothesis'

# Tests that need no other programs, no privileges and few servers.
QUICK := tests/nix tests/fuzz tests/server/test_http.py $(addprefix tests/test_, $(addsuffix .py, \
  address_filter benchmarks config layers publish_policy rate single_flight support))
quick: .venv/ready  ## Run the fast tests: formats, settings, HTTP
	$(BIN)/pytest --numprocesses=auto --dist=worksteal --hypothesis-profile=few \
	  -m 'not nix and not newer_nix and not root and not browser' $(QUICK)

# treefmt.toml lists the tools. All except nixfmt are in .venv.
TREEFMT := PATH="$(CURDIR)/$(BIN):$$PATH" treefmt --allow-missing-formatter

check: .venv/ready  ## Check lints, formatting and types; fail if `make format` changes anything
	$(TREEFMT) --ci
	@command -v nixfmt >/dev/null || echo 'check: nixfmt is not installed, so Nix files are unchecked' >&2
	$(BIN)/mypy

format: .venv/ready  ## Format Python, Nix and shell files, and apply the fixes of ruff
	$(TREEFMT)

# Sets of versions to test: `lowest`, `nixpkgs`, or both.
VERSIONS ?= lowest nixpkgs
test-versions: .venv/ready  ## Test with the lowest supported versions of all dependencies, and with those in nixpkgs
	$(BIN)/pip install --quiet uv
	.ci/test-versions $(BIN)/uv '$(VERSIONS)' $(QUICK)

seaweedfs: .venv/ready  ## Install SeaweedFS, an S3 service, for the tests with the marker `s3`
	$(BIN)/pip install --quiet --editable '.[s3-engine]'

docs: .venv/ready  ## Generate the documents that are derived from the code
	PYTHONPATH=tests $(BIN)/python -m support.generated

pictures: .venv/ready  ## Take the pictures of the pages in docs/pictures (Chromium)
	PYTHONPATH=tests $(BIN)/python -m support.pictures

# SEED: repeat a run; 0 is random. TARGETS: modules of tests/fuzz/targets; default: all.
SEED ?= 0
TARGETS ?=
fuzz: .venv/ready  ## Fuzz the parsers, for SECONDS=60 each
	$(BIN)/pip install --quiet --editable '.[fuzz]'
	PYTHONPATH=tests $(BIN)/python -m fuzz.run $(SECONDS) $(SEED) $(TARGETS)

audit: .venv/ready  ## Check the dependencies for known vulnerabilities
	$(PYTHON) -m venv .audit
	.audit/bin/pip install --quiet pip-audit
	$(BIN)/pip list --format freeze --exclude-editable >.audit/versions
	.audit/bin/pip-audit --no-deps --disable-pip --progress-spinner off --format json -r .audit/versions 2>.audit/log \
	  | $(PYTHON) .ci/audit.py

# Options and measurements of `make bench`; default: all. `--short` takes two minutes, `--docs` writes into docs.
BENCH ?=
bench: .venv/ready  ## Compare the speed with nginx and Nix, if installed (docs/explanation/benchmarks.md)
	PYTHONPATH=tests $(BIN)/python -m benchmarks $(BENCH)

soak: MINUTES ?= 5
soak: .venv/ready  ## Run 1,000 clients with builds, garbage collections and killed workers, for MINUTES=5 (root, Nix)
	PYTHONPATH=tests $(BIN)/python -m benchmarks.soak $(MINUTES)

# Attacks to run; default: all. Below 10 MINUTES, each is smaller.
ATTACKS ?=
attack: MINUTES ?= 25
attack: .venv/ready  ## Attack a server in every known way, and measure the effect on other clients, for MINUTES=25
	PYTHONPATH=tests $(BIN)/python -m benchmarks.attack $(MINUTES) $(ATTACKS)

# Tests to run; default: all. `VM_TEST_QEMU=1` also runs some of them in virtual machines.
TESTS ?=
vm-test: export NIXPKGS := $(NIXPKGS)
vm-test: .venv/ready  ## Run the NixOS tests in containers (root)
	$(BIN)/python nixos-tests/lab/run.py $(if $(VM_TEST_QEMU),--qemu) $(TESTS)

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1 /p' Makefile | while read -r name does; do printf '%-10s%s\n' "$$name" "$$does"; done

clean:  ## Remove everything that the other targets created
	if [ -e demo-store ]; then chmod -R u+w demo-store; fi
	rm -rf .venv .versions .audit bench-results demo-store dist .fuzz .hypothesis .mypy_cache .pytest_cache .ruff_cache

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo '$(PYTHON) is not Python 3.11 or newer; choose one: make $(or $(MAKECMDGOALS),serve) PYTHON=python3.11' >&2; exit 1; }
	@echo 'Downloading the dependencies from PyPI into .venv: about a minute, once'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps '$(AXE)'
	touch $@
