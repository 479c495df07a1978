# `make demo` and `make test` do all their own set-up.
PY := .venv/bin/python

.PHONY: setup setup-test demo test style check bench endurance lock

setup:
	@bash scripts/setup.sh demo

setup-test:
	@bash scripts/setup.sh test

demo: setup
	@.venv/bin/qipan demo

# Style, types, imports, and every test that is not marked endurance: two at a time what leaves the cores to
# others (a file on one core, what only computes wherever one is free), then alone what runs real processes.
test: style
	@$(PY) -m pytest -n 2 -m "not endurance and (not slow or computes)"
	@$(PY) -m pytest -m "slow and not computes and not endurance"

style: setup-test
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

# The fast suite: no test here runs real processes for more than a few seconds.
check: style
	@$(PY) -m pytest -n 2 -m "not slow and not endurance"

endurance: setup-test
	@$(PY) -m pytest -m endurance --timeout 7200

bench: setup-test
	@$(PY) -m benchmarks.twin --json /dev/stdout

lock:
	@bash scripts/lock.sh
