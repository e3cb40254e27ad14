# `make demo` and `make test` set everything up by themselves; see README.md.
PYTHON ?= python3
PROCESSES ?= 2
BIN := .venv/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: demo test lint system clean

demo: .venv/ready
	$(BIN)/gristmill demo

# Two processes, a file to each in the order of tests/conftest.py; `make test PROCESSES=0` runs all in one.
test: .venv/ready-for-tests
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

lint: .venv/ready-for-tests
	$(BIN)/python -m pytest -q tests/test_lint.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Gristmill needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }

.venv/ready: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/ready-for-tests: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

# Programs that some tests use where they find them; everything else needs none of them.
system:
	$(SUDO) apt-get update -q
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
		prometheus prometheus-alertmanager chromium fonts-dejavu-core iproute2 openssl \
		slurmctld slurmd slurm-client munge \
		plasma-workspace-wallpapers gnome-backgrounds

clean:
	rm -rf .venv gristmill-demo
