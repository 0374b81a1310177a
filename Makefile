# make train   train a small LLaMA on the Python standard library, from nothing
# make test    run the tests, but for the slow ones
# make test-slow    run those
# make test-gpu  compile the GPU kernels for an H200; no GPU is needed
# make parity  compare with the transformers package's LLaMA
# make bench   time the step and the optimizers against hand-written ones
# make bench-peers  time the optimizers against others' and compare with qwix
# make bench-kernels  count the cycles of TPU kernels, by their compiler
# make memory-table  optimizer state and peak HBM by the TPU's compiler; hours
# Each makes the virtual environment that it needs. PYTHON=python3.12 chooses
# the interpreter; VENV=DIR where the environment lives.

comma := ,
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# An environment is made anew when the interpreter's version changes.
VERSION := $(shell $(PYTHON) -c 'import sys; print("py%d.%d" % sys.version_info[:2])')
READY := $(VENV)/ready-$(VERSION)
PARITY_VENV ?= .venv-parity
KERNELS_VENV ?= .venv-kernels
GPU_VENV ?= .venv-gpu
WORKDIR ?= runs/tiny
CONFIG ?= configs/llama.py:size=tiny,opt=galore
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export JAX_PLATFORMS ?= cpu
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: train test test-slow test-gpu lint smoke parity bench bench-peers bench-kernels memory-table clean

train: $(READY)
	$(PY) -m frugax.train.corpus --data_dir=data
	$(PY) -m frugax.train --config=$(CONFIG) --workdir="$(WORKDIR)" $(ARGS)
	$(PY) -m frugax.report "$(WORKDIR)" --curves-only --plot="$(WORKDIR)/loss.png"

PYTEST := -m pytest -n 2 --dist loadfile --durations=10

test: $(READY)
	$(PY) $(PYTEST) -m 'not slow'

test-slow: $(READY)
	$(PY) $(PYTEST) -m slow

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

smoke: $(READY)
	$(PY) -m pytest tests/smoke_test.py

test-gpu: $(GPU_VENV)/ready-$(VERSION)
	PYTHONPATH=research $(GPU_VENV)/bin/python -m pytest tests/kernels/gpu_test.py -v

parity: $(PARITY_VENV)/ready-$(VERSION)
	$(PARITY_VENV)/bin/python -m pytest tests/parity -v

bench: $(READY)
	$(PY) research/studies/bench_step.py
	$(PY) research/studies/bench_optim.py

# The packages of the peers, in an environment of their own, at the versions of
# research/studies/bench_peers.log: transformers is what the first two import.
PEERS := galore-torch==1.0 apollo-torch==1.0.3 transformers==5.24.0 pytorch-optimizer==4.1.0
PEERS += torchao==0.18.0 bitsandbytes==0.50.2 torch==2.13.0 numpy==2.4.6
bench-peers: $(READY)
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet $(PEERS)
	$(PY) research/studies/bench_peers.py --python .venv-peers/bin/python
	$(PY) -m pip install --quiet --no-deps --upgrade --target .cache/qwix qwix==0.1.8
	PYTHONPATH=.cache/qwix $(PY) research/studies/bench_qwix.py

# Static estimates by the TPU's compiler, in an environment of its own: that of
# `dev` takes tens of GB for the profile of a kernel, and has none for tpu7x.
bench-kernels: $(KERNELS_VENV)/ready-$(VERSION)
	$(KERNELS_VENV)/bin/python research/studies/bench_kernels.py
	$(KERNELS_VENV)/bin/python research/studies/bench_hadamard.py

# The state of each optimizer takes a minute. Each peak takes the compiler some:
# PEAKS=1b for those of one size, PEAKS=none for none. They are kept.
PEAKS ?= 60m,130m,350m,1b,7b
memory-table: $(READY)
	$(PY) research/studies/memory_table.py --peaks=$(PEAKS)

clean:
	rm -rf .venv .venv-* .cache

# pip takes the newest versions that the constraints of this Python allow.
CONSTRAINTS := launch/constraints/$(if $(filter py3.11,$(VERSION)),py311,py312).txt
define venv
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"frugax needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; choose one with make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "making the virtual environment $(@D) (a few minutes the first time)"
	@$(PYTHON) -m venv --clear $(@D) || { echo "python -m venv failed; on Debian: apt install python3-venv"; exit 1; }
endef
define install
	$(venv)
	$(@D)/bin/python -m pip install --quiet --editable '.[$(1)]' --constraint $(CONSTRAINTS)
	@touch $@
endef

$(READY): pyproject.toml $(wildcard launch/constraints/*.txt)
	$(call install,dev)

$(PARITY_VENV)/ready-$(VERSION): pyproject.toml $(wildcard launch/constraints/*.txt)
	$(call install,dev$(comma)parity)

$(KERNELS_VENV)/ready-$(VERSION): pyproject.toml $(wildcard launch/constraints/*.txt)
	$(call install,tpu)
	$(@D)/bin/python -m pip install --quiet --no-deps libtpu==0.0.51 || { rm $@; exit 1; }

# The compilers without their dependencies, which are libraries for a GPU at hand.
$(GPU_VENV)/ready-$(VERSION): $(wildcard launch/constraints/*.txt)
	$(venv)
	$(@D)/bin/python -m pip install --quiet absl-py jax pytest --constraint $(CONSTRAINTS)
	$(@D)/bin/python -m pip install --quiet --no-deps jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12 --constraint $(CONSTRAINTS)
	@touch $@
