# Every target sets up .venv by itself; all it needs is Python 3.11 or later.
#   PYTHON       interpreter of the new .venv (default: the first suitable one found)
#   TORCH        what to install when .venv has no torch >= 2.11
#   WORKERS      processes that `make test` runs in, one thread and up to three gigabytes each (default: 2)
#   TORCH_INDEX  package index to take torch from, for instance PyTorch's own CPU index, which spares Linux
#                the gigabytes of CUDA (default: pip's own settings)

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
WORKERS ?= 2

BIN := .venv/bin
NANO_RECIPES := $(addprefix recipes/,$(addsuffix .yaml,nano_teacher nano_pixel nano_tokenizer nano_decoder nano_decoder_ssim \
	world_start world_pretrain_64 world_read world_read2 world_read3 world_read4 world_read5 nano_judge world_judge))
BENCHMARKS = $(filter-out benchmarks/_% benchmarks/gpu_%,$(wildcard benchmarks/*.py))

define HAS_TORCH
from importlib.metadata import version; assert tuple(map(int, version("torch").split(".")[:2])) >= (2, 11)
endef

.PHONY: demo test lint nano nano-gpu bench setup clean

demo: .venv/.ready
	$(BIN)/python examples/demo.py
	$(BIN)/python examples/tasks.py

test: .venv/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --cov=nextflow_ar --cov-report=term:skip-covered --cov-fail-under=85

lint: .venv/.ready-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports

nano: .venv/.ready
	set -e; for recipe in $(NANO_RECIPES); do $(BIN)/nextflow-ar train $$recipe; done
	$(BIN)/nextflow-ar export runs/world_read5/final -o runs/nano_scenes --image-tokenizer runs/nano_decoder_ssim/final \
		--average runs/world_read4/final --average runs/world_read3/final \
		--set guidance=2.0 --set think=true --set "caption=say in one sentence what this is" --set answer_guidance=1.25
	set -e; for recipe in nano_tasks nano_more nano_copies nano_crowd nano_relations; do OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 \
		--no-python $(BIN)/nextflow-ar train recipes/$$recipe.yaml; done
	$(BIN)/nextflow-ar export runs/nano_relations/final -o runs/nano_mean --average runs/nano_copies/final --set guidance=2.0 --set 'temperature=[1.0,0.0]' --set top_p=0.9 --set think=true --set think_edits=true \
		--set thought_temperature=0.3 --set dialogue=true --set 'canvases=[64x64,72x56,56x72,80x48,48x80,96x96,128x128]' \
		--set 'caption=what is in the picture?' --set 'video=a video in which {prompt}, {frames} frames' --set answer_guidance=1.25
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 --no-python $(BIN)/nextflow-ar train recipes/nano_polish.yaml
	$(BIN)/nextflow-ar export runs/nano_polish/final -o runs/nano_polished --average runs/nano_mean
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 --no-python $(BIN)/nextflow-ar train recipes/nano_plans.yaml
	$(BIN)/nextflow-ar export runs/nano_plans/final -o runs/nano --set think_told=true

# Goes on where `make nano` ended: eleven minutes of one GPU, then half an hour of two cores.
nano-gpu: .venv/.ready
	$(BIN)/nextflow-ar train recipes/gpu_nano.yaml --minutes 11
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 --no-python $(BIN)/nextflow-ar train recipes/nano_settle.yaml
	$(BIN)/nextflow-ar export runs/nano_settle/final -o runs/nano --average runs/gpu_nano/final --average runs/gpu_nano/final --set think_told=true

bench: .venv/.ready
	set -e; for file in $(BENCHMARKS); do $(BIN)/python $$file; done

setup: .venv/.ready-dev

.venv/.ready: pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "make: no Python 3.11 or later found; install one or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null || \
		$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(BIN)/python -m pip install -e .
	@touch $@

.venv/.ready-dev: .venv/.ready
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@

# Trained runs and .venv stay.
clean:
	rm -rf out build dist htmlcov .coverage* .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
