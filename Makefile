# make demo | test | test-slow | lint | bench | clean. Needs Python >= 3.11 with venv, pip and make; all else goes into .venv.
#   PYTHON=python3.12      the Python that .venv is made with
#   DATA=FOLDER TEST=FOLDER   make demo with your own recordings, into demo-run/own

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test test-slow lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/s2lora demo $(if $(DATA),--data "$(DATA)" --output demo-run/own) $(if $(TEST),--test "$(TEST)")

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.demo
	$(BIN)/python -m bench.run

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# One stamp for each set of dependencies; a changed pyproject.toml installs anew. torch first, so that it is the pinned one.
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	@echo "installing fused-s2lora[$*] into $(VENV) (a few minutes the first time)"
	@$(PIP) install -e ".[$*]"
	@touch $@

$(VENV)/.torch: $(VENV)/.python
	@echo "installing $(TORCH) into $(VENV)"
	@$(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is missing or older than 3.11; name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "$(PYTHON) lacks venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@
