PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test types lint reproduce clean

demo: $(VENV)/.runtime ## the whole chain on drawn images, offline
	$(BIN)/python scripts/demo.py --output_dir demo --force

test: $(VENV)/.development ## lint, then every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

types: $(VENV)/.development ## check types; needs the newest torch, whose annotations are the most complete
	$(BIN)/mypy

lint: $(VENV)/.development ## fix what can be fixed, show the rest
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

reproduce: $(VENV)/.development ## every command behind the README's numbers, in order; hours
	$(BIN)/python -m pip install -r requirements-benchmarks.txt
	$(BIN)/python scripts/reproduce.py $(DATA)
	$(BIN)/python scripts/report.py

clean: ## remove what the targets above made; weights and results stay
	rm -rf $(VENV) demo .mypy_cache

$(VENV)/.runtime: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

$(VENV)/.development: requirements-dev.txt $(VENV)/.runtime
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@
