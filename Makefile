# make run    start everything on this machine (http://127.0.0.1:8000)
# make test   all tests with coverage        make lint   style and types
# make bench  the measurements of bench/     make lock   pin the newest packages that fit
# Only a Python >= 3.11 with venv is needed; everything else goes into .venv.

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$python" && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
COMPILE := $(VENV)/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-annotate --no-header
LINTED := webhook_app pollers jobs

.DEFAULT_GOAL := run
.NOTPARALLEL:
.PHONY: run test lint bench lock clean

run: $(VENV)/runtime-installed $(VENV)/project-installed
	@exec $(BIN)/buildrelay up $(ARGS)

# Most tests wait for real servers and processes, so files run side by side, also on one core.
test: $(VENV)/test-installed $(VENV)/project-installed
	$(BIN)/python -m pytest --numprocesses=$(or $(JOBS),3) --dist=loadfile --cov --cov-report=term $(ARGS)

lint: $(VENV)/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(LINTED)

bench: $(VENV)/test-installed $(VENV)/project-installed
	$(BIN)/python -m bench $(ARGS)

# The stamps are files in .venv: an install is repeated only when the file it comes from changed.
# --no-deps: the lock is complete.  Without it an older pip takes `coverage[toml]` for something else than the
# pinned `coverage`, finds a newer release, and refuses it for having no hash.
$(VENV)/made:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'Python 3.11 or newer is needed. Install it, or name it: make PYTHON=/path/to/python3' >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo 'This Python has no venv. On Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	@echo 'Making $(VENV) with $(PYTHON)'
	@"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

$(VENV)/runtime-installed: requirements.txt $(VENV)/made
	@echo 'Installing the packages of $<'
	@$(PIP) install --require-hashes --no-deps -r $<
	@touch $@

$(VENV)/test-installed: requirements-test.txt $(VENV)/made
	@echo 'Installing the packages of $<'
	@$(PIP) install --require-hashes --no-deps -r $<
	@touch $@ $(VENV)/runtime-installed

# Setuptools comes from the lock, so nothing is fetched here.
$(VENV)/project-installed: pyproject.toml | $(VENV)/made
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# UPGRADE= keeps the pinned versions and only adds what is missing.
UPGRADE ?= --upgrade
lock: $(VENV)/made
	@test -x $(VENV)/lock/bin/uv || { $(BIN)/python -m venv $(VENV)/lock && \
		$(VENV)/lock/bin/python -m pip --disable-pip-version-check --quiet install uv; }
	echo setuptools | $(COMPILE) $(UPGRADE) - pyproject.toml --output-file requirements.txt
	echo setuptools | $(COMPILE) $(UPGRADE) - pyproject.toml --extra test \
		--constraint requirements.txt --output-file requirements-test.txt

clean:
	rm -rf $(VENV) build dist htmlcov .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
