PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv demo demo-checkpoint test lint types hostile test-newest test-oldest test-transformers-main test-ecosystem test-gpu test-gpus bench clean

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu and not gpus and not ecosystem"

# mypy reads the package under its own name, whatever this folder is called.
$(VENV)/types/indexcache: venv
	mkdir -p $(VENV)/types
	ln -sfn ../.. $@

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(VENV)/types/indexcache
	$(BIN)/mypy

# What a user's `pip install` may bring: the newest of everything, and the oldest that setup.cfg allows; every
# night transformers' main. Each in an environment of its own, several gigabytes with torch's CUDA build, removed afterwards.
ACROSS := tests/configuration tests/modeling_indexcache tests/conversion/check/test_verify.py \
	$(addprefix tests/conversion/convert/test_,convert.py released_configs.py) \
	$(addprefix tests/conversion/publish/test_,bundle.py hub.py refresh.py)
INSTALL_oldest := --constraint constraints-oldest.txt
INSTALL_transformers-main := git+https://github.com/huggingface/transformers
test-newest test-oldest test-transformers-main: test-%:
	rm -rf .venv-$*
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet $(INSTALL_$*) --editable '.[test]'
	.venv-$*/bin/python -m pip list --format=freeze | grep -iE '^(torch|triton|transformers|tokenizers|huggingface_hub|safetensors|numpy|accelerate)='
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n 2 -m "not gpu and not gpus" $(ACROSS)
	rm -rf .venv-$*

# Other projects' tools on a model, by the installed package and by remote code, in an environment of its own; writes the
# table of docs/ecosystem.md. ECOSYSTEM=python is an environment that has them.
ECOSYSTEM ?= .venv-ecosystem/bin/python
ROWS := build/ecosystem.json
.venv-ecosystem/bin/python: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv-ecosystem
	$@ -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$@ -m pip install --quiet --constraint constraints.txt --editable '.[test,ecosystem]'
	touch $@

test-ecosystem: $(ECOSYSTEM)
	rm -f $(ROWS)
	for way in installed remote; do \
	OMP_NUM_THREADS=1 INDEXCACHE_ECOSYSTEM_WAY=$$way INDEXCACHE_ECOSYSTEM_RESULTS=$(ROWS) \
	$(ECOSYSTEM) -m pytest tests/ecosystem -rs || touch $(ROWS).failed; done
	$(ECOSYSTEM) tests/ecosystem/write_table.py $(ROWS) docs/ecosystem.md
	@! rm $(ROWS).failed 2>/dev/null

# Hostile inputs and kills until SECONDS are over, on two processes; ONLY=kind or ONLY=kind:number repeats. See
# docs/reliability.md.
SECONDS ?= 3600
SEED ?= 0
ONLY ?=
hostile: venv
	$(BIN)/python tests/hostile/campaign.py --seconds $(SECONDS) --seed $(SEED) $(if $(ONLY),--only $(ONLY))

test-gpu: venv
	$(BIN)/python -m pytest -m "gpu and not gpus"

# Two GPUs: any device, device_map, tensor and expert parallel, FSDP2, DDP, search in two processes.
test-gpus: venv
	$(BIN)/python -m pytest -m gpus

bench: venv
	$(BIN)/python -m indexcache.cli bench

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-ecosystem build dist *.egg-info
