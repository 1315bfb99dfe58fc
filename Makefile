# One command for each thing a person does here; `make` alone lists them. Needs python3 (3.11 or newer) and make.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
MIDDLE := not slow and not gpu and not slurm
FLOORS ?= lowest
PIP_FLAGS ?= $(if $(CI),--quiet)
CODE := data_pipeline mmscale launchers benchmarks tests examples docs/site

# Several ranks share the cores of one machine; more threads than cores would slow all of them down.
export OMP_NUM_THREADS ?= 1
# Cache compiled modules, even where the shell forbids it: each rank, worker and test process imports them anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup quickstart docs quick test-near test test-slow test-slurm test-apart gpu-check test-all test-floors lint format golden bench clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1#\2/p' $(MAKEFILE_LIST) | column -t -s '#' 2>/dev/null || true

setup: $(STAMP) ## Make .venv with everything in it; TORCH=cpu takes torch's smaller build without CUDA
	@echo "Ready: .venv ($$(du -sh .venv | cut -f1))."
	@echo "  In each new shell:  source .venv/bin/activate"
	@echo "  Next:               make quickstart    (about ten minutes on two cores), or mmscale --help"

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$($(PYTHON) -V); mmscale needs 3.11 or newer: make setup PYTHON=python3.12"; exit 1; }
	@echo "Installing mmscale, its tests and its documentation tools into .venv. The download is about 0.7 GB with torch's"
	@echo "CPU build (2.2 GB on disk), and about 4 GB with its CUDA build (7 GB on disk): 3 to 15 minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install $(PIP_FLAGS) --upgrade pip
	@$(if $(TORCH),$(BIN)/python -m pip install $(PIP_FLAGS) uv)
	@$(if $(TORCH),$(BIN)/uv pip install --python $(BIN)/python --torch-backend $(TORCH) torch torchvision)
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[dev,docs,hf]'
	@touch $@

quickstart: $(STAMP) ## Train a small vision-language model on bundled data: two ranks, about ten minutes
	$(BIN)/mmscale launch local configs/quickstart.yaml --ranks 2
	@echo "Done. Open runs/quickstart/report.html"

# Without --quiet, which would also silence strict mode.
docs: $(STAMP) ## Build the documentation, with a search and a reference of the API, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "Done. Open site/index.html"

quick: lint ## Lint, and the tests of single parts: no ranks, kills, reference models or whole commands
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not (dist or resume or fault or parity or long or slow or gpu or slurm)" \
		$(addprefix --ignore=tests/,benchmarks cli compare docs examples golden system trace test_parity_table.py)

test-near: $(STAMP) ## Run the tests that import what changed: make test-near FILES="mmscale/nn/rope.py"
	@tests=$$($(BIN)/python -m tests.near $(FILES)) && $(BIN)/python -m pytest -q -m "$(MIDDLE)" $$tests

# Three workers for two cores: many tests wait for timers and other processes.
test: $(STAMP) ## Run the tests that need neither a GPU, a cluster nor patience
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m "$(MIDDLE)"

test-slow: $(STAMP) ## Run the tests that take minutes each: long runs, every page of docs/, every size of a recipe
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m "slow and not gpu and not slurm"

# On a cluster of virtual nodes that the tests start. Debian and Ubuntu: apt-get install slurmctld slurmd munge.
test-slurm: $(STAMP) ## Run the tests on a real SLURM of this machine: preemption, lost nodes and ranks, the time limit
	$(BIN)/python -m pytest -q -m slurm

gpu-check: $(STAMP) ## Examine a GPU machine: doctor, every GPU test, speed and memory of three models; writes runs/gpu-check
	$(BIN)/python -m tests.gpu.check

# lmms-eval and Trackio need older versions of some packages than the other tests, so they get an environment on top of .venv.
test-apart: $(STAMP) ## Run the tests with lmms-eval and Trackio, in .venv-apart
	test -x .venv-apart/bin/python || $(BIN)/python -m venv .venv-apart
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(.venv-apart/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	.venv-apart/bin/python -m pip install --quiet 'lmms-eval>=0.7.3' 'filelock<4' 'trackio>=0.43,<1'
	PYTHONPATH=. .venv-apart/bin/python -m pytest -q -m slow -k "lmms or trackio" tests/harness/test_lmms_eval.py \
		tests/metrics/test_tracker_packages.py

# With other test tools too: what pyproject.toml admits is what a user may get.
test-floors: $(STAMP) ## Run `make test` with the lowest admitted versions in .venv-lowest; FLOORS=highest: with the newest
	test -x .venv-$(FLOORS)/bin/python || $(PYTHON) -m venv .venv-$(FLOORS)
	$(BIN)/uv pip compile --quiet --python .venv-$(FLOORS)/bin/python $(if $(TORCH),--torch-backend $(TORCH)) \
		--resolution $(subst lowest,lowest-direct,$(FLOORS)) --extra dev --extra hf pyproject.toml -o .venv-$(FLOORS)/versions.txt
	$(BIN)/uv pip sync --python .venv-$(FLOORS)/bin/python $(if $(TORCH),--torch-backend $(TORCH)) .venv-$(FLOORS)/versions.txt
	$(BIN)/uv pip install --python .venv-$(FLOORS)/bin/python --no-deps -e .
	$(if $(filter lowest,$(FLOORS)),.venv-$(FLOORS)/bin/python -m tests.floors .venv-$(FLOORS)/versions.txt)
	.venv-$(FLOORS)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "$(MIDDLE)" $(TESTS)

test-all: $(STAMP) ## Run every test this machine can run; without SLURM and a GPU their tests fail
	$(BIN)/python -m pytest -q

lint: $(STAMP) ## Check format, style, types and the import floors
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Put the code into its format
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

golden: $(STAMP) ## Write down anew what each model is: tests/golden and the table of configs/README.md
	$(BIN)/python -m tests.golden

bench: $(STAMP) ## Measure against peers, side by side
	@for name in attention checkpoint dropout image_tokens sample_log loader loss_memory moe order_scale packing remote shuffle train_step zero_memory; do \
		echo "== $$name"; $(BIN)/python -m benchmarks.$$name || exit 1; \
	done

clean: ## Remove runs, caches and .venv
	rm -rf .venv .venv-lowest .venv-highest .venv-apart runs build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
