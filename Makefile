PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv demo demo-checkpoint test lint test-gpu bench clean

# One environment for everything; a stamp so that it is made once and again when a requirement changes.
venv: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: venv
	$(BIN)/python demo/walkthrough.py

# Trains the demo checkpoint from nothing, on a GPU in ten minutes, and writes it as demo/dsa_demo is. TEXT and WINDOWS
# are described in the script; ARGS=--resume goes on with a run that was stopped.
OUT ?= build/dsa_demo
demo-checkpoint: venv
	$(BIN)/python demo/train_checkpoint.py $(TEXT) $(WINDOWS) $(OUT) $(ARGS)

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu"

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

test-gpu: venv
	$(BIN)/python -m pytest -m gpu

bench: venv
	$(BIN)/python -m indexcache.cli bench

clean:
	rm -rf $(VENV) build dist *.egg-info
