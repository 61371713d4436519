# Two commands matter: `make demo` and `make test`. Both make their own environment.
# A Python 3.11 or later is looked for; name another with PYTHON=/path/to/python3.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that run tests; 0 for one, in the foreground (a debugger's). ARGS go to pytest.
WORKERS ?= auto
# BARE=1 hides every server on the PATH: what is left came with wheels.
PYTEST = $(if $(BARE),PAPAOURS_BARE=1) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-quick test-all test-lowest check simulate mutants usage-faults bench bench-guard bench-report clean

demo: $(VENV)/.demo
	@$(BIN)/papaours-auth demo $(if $(KEEP),--keep)

test: $(VENV)/.test
	$(PYTEST) $(ARGS)

# Under a minute: what needs no server.
test-quick: $(VENV)/.test
	$(PYTEST) --quick $(ARGS)

# The suite on every interpreter here that the library supports, each in its own environment.
test-all:
	@sh tests/on-every-python.sh

# The suite with the oldest versions that pyproject.toml admits.
test-lowest:
	@PYTHON=$(PYTHON) sh tests/with-lowest-versions.sh

check: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -n $(WORKERS) --dist worksteal
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report
	@sh tests/built-wheel.sh $(BIN)/python

# The fault simulation: COUNT seeds, or the one named SEED with all that happens in it.
simulate: $(VENV)/.test
	@PYTHONPATH=tests $(BIN)/python -m simulation $(if $(SEED),--seed $(SEED),--count $(or $(COUNT),10000)) $(ARGS)

# Small changes of the core, one at a time: does a test notice? Remembers what was found (.mutants.json). Not in CI.
# ARGS='--module cache.py' for one module; ARGS=--fresh to begin anew. See docs/design/mutants.md.
mutants: $(VENV)/.test
	@PYTHONPATH=tests nice -n 10 $(BIN)/python -m mutants $(ARGS)

# 200,000 calls through real servers and faults; `make test` has a tenth of them.
usage-faults: $(VENV)/.test
	PAPAOURS_FAULT_SCALE=1 $(BIN)/python -m pytest tests/test_usage_faults.py --durations=0 $(ARGS)

# All benchmarks (15 minutes), or one: `make bench-floor`; ARGS='--scale 0.1' for a short run. Each prints a table
# and writes benchmarks/results/. A load generator and instruction counts need wrk and valgrind.
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(ARGS)

bench-%: $(VENV)/.bench
	$(BIN)/python -m benchmarks $* $(ARGS)

# Writes docs/performance.md from benchmarks/results/.
bench-report: $(VENV)/.test
	$(BIN)/python -m benchmarks.report

# Fails where a ratio became worse than noise explains: two minutes.
bench-guard: $(VENV)/.test
	$(BIN)/python -m benchmarks.guard

clean:
	rm -rf .venv* dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* .mutants.json

$(VENV)/.pip: pyproject.toml
	@test -n "$(PYTHON)" || { echo "papaours-auth needs Python 3.11 or later, and none is on the PATH: install one, or say PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.demo: $(VENV)/.pip
	$(BIN)/pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.pip
	$(BIN)/pip install --quiet --editable '.[all]' --group test
	@touch $@ $(VENV)/.demo

$(VENV)/.check: $(VENV)/.test
	$(BIN)/pip install --quiet --group check
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	$(BIN)/pip install --quiet --group bench
	@touch $@
