# Everything runs in .venv, made with the first Python >= 3.11 found; PYTHON=... picks another.
PYTHON ?= python3
# CuPy for PyPI's torch, which is built for CUDA 13, and the test tools.
EXTRAS ?= cuda13,dev
# Processes that run the tests; each keeps one core busy.
WORKERS ?= 2
# glibc gives every large tensor's memory back to the kernel, which a fifth of the tests' time would go to.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296
VENV := .venv
RUN := $(VENV)/bin/python
comma := ,
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

# The first seed from that of the configuration on with which rounding to half precision changes no prediction. In
# C kernels, with another number of threads than two or on another kind of processor sums are rounded differently.
WEIGHTS := train.py --config configs/digits.yaml --train.seed 1001 --model.backend torch

.PHONY: help install gpu demo weights test test-slow lint format clean

help:
	@echo "make demo     install into .venv, look into a trained network, train on handwritten digits, evaluate (no download)"
	@echo "make test     install into .venv, lint, run all tests but the slow ones"
	@echo "make test-slow  those: longer training against the original's numbers, fuzzing, compiling (a quarter of an hour)"
	@echo "make weights  train the network that travels in the package again"
	@echo "make gpu      on a machine with a GPU: check the kernels, measure, verdicts (25 minutes; GPU=--quick 5)"
	@echo "make format   let ruff rewrite the sources"
	@echo "make clean    remove .venv and the demo's and the weights' run folders"
	@echo "EXTRAS=dev leaves CuPy out (machines without CUDA wheels); PYTHON=python3.12 picks the interpreter"

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml gac/version.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gac needs Python >= 3.11, $(PYTHON) is %d.%d: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

demo: install
	$(RUN) -m gac.demo
	rm -rf runs/demo
	$(RUN) train.py --config configs/digits.yaml --output runs/demo
	$(RUN) eval.py --checkpoint runs/demo/best.pt

weights: install
	rm -rf runs/weights runs/release
	OMP_NUM_THREADS=2 $(RUN) $(WEIGHTS) --output runs/weights
	$(RUN) -m gac.release runs/weights runs/release --name digits --half --command "$(WEIGHTS)"
	cp runs/release/model.safetensors gac/weights/digits.safetensors
	cp runs/release/release.json gac/weights/digits.json
	cp runs/release/metrics.jsonl gac/weights/digits.jsonl

test: install lint
	OMP_NUM_THREADS=1 $(KEEP_MEMORY) $(RUN) -m pytest --numprocesses $(WORKERS) -m "not slow"

test-slow: install
	$(KEEP_MEMORY) $(RUN) -m pytest -m slow

# GPU=... are options of benchmarks.gpu, such as --quick or --data cifar10.npz.
gpu: install
	$(RUN) -m benchmarks.gpu $(GPU)

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) runs/demo runs/demo-report runs/weights runs/release
