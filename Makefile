# Everything runs in .venv, which `make` keeps in step with pyproject.toml. Nothing else is needed but Python 3.11+.

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON := .venv/bin/python
STAMP  := .venv/.in-step-with-pyproject
UV     := $(shell command -v uv 2>/dev/null)
# Two processes, each with servers of its own: much of a test's time is waiting, and more would mostly boot servers.
WORKERS := --numprocesses 2 --dist worksteal
# A name may be there without the program behind it (shims of version managers), so each is asked for its version.
BASE   := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: venv sync
venv: $(STAMP) ## create or refresh .venv
sync: $(STAMP)

$(STAMP): pyproject.toml
	@echo "setting up .venv (once, and whenever pyproject.toml changes)"
ifneq ($(UV),)
	@$(UV) venv --quiet --seed --allow-existing --python '>=3.11' .venv
	@$(UV) pip install --quiet --python $(PYTHON) --editable . --group dev
else
	@test -n "$(BASE)" || { echo "no Python 3.11 or newer on the PATH: install one, or uv (https://docs.astral.sh/uv/)" >&2; exit 1; }
	@test -x .venv/bin/pip || $(BASE) -m venv .venv || $(VENV_PACKAGE)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable . --group dev
endif
	@touch $@

# Debian ships `python3 -m venv` in a package of its own.
VENV_PACKAGE = { rm -rf .venv; test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
                 apt-get -qq update && apt-get -qq install --yes python3-venv && $(BASE) -m venv .venv; }

.PHONY: demo
demo: $(STAMP) ## the story with its counts, on embedded SQLite; then it keeps running (DEMO=brief: it ends)
	@$(PYTHON) -m publisher.demo

.PHONY: dev
dev: $(STAMP) ## API with reload on port 8000, relay and services, on embedded SQLite, until Ctrl-C
	@.venv/bin/flask --app publisher migrate
	@pids=''; trap 'kill $$pids 2>/dev/null; wait' EXIT; trap 'exit 0' INT TERM; \
	 for process in 'relay' 'consumer run exports' 'consumer run notifications'; do \
	   .venv/bin/outbox $$process & pids="$$pids $$!"; \
	 done; \
	 .venv/bin/flask --app publisher run --debug --port 8000

.PHONY: test
test: $(STAMP) ## all tests, on private PostgreSQL and RabbitMQ (ARGS="-k relay": some; ARGS="-n 0": in one process)
	@$(PYTHON) -m tests.kit.provision
	@$(PYTHON) -m pytest $(WORKERS) $(ARGS)

.PHONY: chaos
chaos: $(STAMP) ## the tests that kill processes and servers (SEED=42: as in the run that printed this seed)
	@$(PYTHON) -m tests.kit.provision
	@TEST_SEED=$(SEED) $(PYTHON) -m pytest -m faults $(ARGS)

.PHONY: lab
lab: $(STAMP) ## an installation under one fault after the other, with a verdict (SECONDS=3600 SEED=42 FAULTS=a,b)
	@$(PYTHON) -m tests.kit.provision
	@$(PYTHON) -m tests.lab --seconds $(or $(SECONDS),300) $(if $(SEED),--seed $(SEED)) $(if $(FAULTS),--faults $(FAULTS)) $(ARGS)

.PHONY: lint
lint: $(STAMP) ## ruff (rules and format) and mypy
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

.PHONY: bench
bench: $(STAMP) ## measure, against a plain publisher that confirms one at a time
	@$(PYTHON) -m tests.kit.provision
	@$(PYTHON) -m benchmarks $(ARGS)

.PHONY: wheel
wheel: $(STAMP) ## build the library into dist/
	@$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

.PHONY: up down
up: ## the whole application with PostgreSQL and RabbitMQ, in containers
	docker compose up --build --detach
	docker compose ps
down: ## stop and remove these containers; the data stays
	docker compose down
