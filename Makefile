# `make` or `make help` lists what there is.
PRESET ?= demo
CORES  ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
PYTHON ?= python3
BIN    := .venv/bin
RUNS   := runs
COMMITTED ?= True

export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help install demo run figures openi-images test gpu-test benchmarks gpu-pack gpu-visit gpu-unpack lab outputs results clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed ## create .venv with everything the project needs

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cxrvlm needs Python 3.11 or newer; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install ## train on Open-i's reports with phantoms, and draw the curve: 8 minutes on 2 cores
	@$(MAKE) --no-print-directory run PRESET=demo COMMITTED=False

run: install ## train the runs of PRESET that are not in results/, and draw all: make run PRESET=openi
	@snakemake --cores $(CORES) $(PRESET) --config runs=$(RUNS) committed=$(COMMITTED)
	@echo && cat $(RUNS)/$(PRESET)/figures/retrieval_curve.txt && echo && ls $(RUNS)/$(PRESET)/figures/*.png

figures: install ## draw all figures, tables and claims of PRESET, from runs/ or results/
	@cxrvlm figures $(PRESET)

openi-images: install ## download Open-i's own images into data/openi, and check each
	@python -m cxrvlm.download data/openi

test: install ## everything that CI checks, without GPU and network
	@ruff check .
	@HF_HUB_OFFLINE=1 pytest -n 2 --dist loadfile

gpu-test: install ## the tests that need a GPU
	@pytest -m gpu
	@nbdev-test --flags cuda

BENCHMARKS ?= --json build/benchmarks.json

benchmarks: install ## time ours beside its references, in ten minutes on 2 quiet cores; BENCHMARKS='--device cuda' on a GPU
	@HF_HUB_OFFLINE=1 python -m benchmarks $(BENCHMARKS)

gpu-pack: install ## what a bare GPU machine lacks, in packs that are small enough to send (workflow/gpu/pack.py says how)
	@python workflow/gpu/pack.py

gpu-visit: ## on that machine: tests, benchmarks and a sweep in MINUTES=9, results in OUT
	@$(PYTHON) workflow/gpu/visit.py --minutes $(or $(MINUTES),9) $(if $(OUT),--out "$(OUT)") $(if $(PARTS),--parts $(PARTS))

gpu-unpack: install ## add the results of a visit to results/: make gpu-unpack FILES=build/gpu-visit
	@python workflow/gpu/unpack.py $(FILES)

lab: install ## read and run the notebooks in Jupyter
	@jupyter lab nbs

outputs: install ## run every notebook, store its outputs, export the package and the README
	@python tests/notebooks.py --write

results: install ## merge the tables of PRESET from runs/ into results/, for git, and draw its curve
	@python -m cxrvlm.committed merge $(PRESET) --runs $(RUNS)

clean: ## remove what make and snakemake left, except .venv and runs
	@rm -rf .snakemake build *.egg-info .pytest_cache .ruff_cache .hypothesis
	@git worktree prune 2>/dev/null || true  # of the benchmarks' reference, which was in build
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
