PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-fast torture check deepspeed clean

# Train, evaluate, save and predict on the built-in corpus and model: no hub, no account.
demo: $(VENV)/.installed
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train_mrpc.py --demo --overwrite_output_dir

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Without the tests that start the script, Slurm or a browser in processes of their own.
test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not processes"

# Killed twenty times for each number of processes and accumulation, instead of a few times.
torture: $(VENV)/.installed-dev
	TORTURE_KILLS=20 $(BIN)/python -m pytest tests/end_to_end/test_preemption.py -k killed_anywhere

# For the tests of accelerate_configs/deepspeed_zero2.yaml, which are skipped without it. Its build
# imports PyTorch, so it must not be isolated from the environment.
deepspeed: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet "setuptools<81"
	DS_ACCELERATOR=cpu $(BIN)/pip install --quiet --no-build-isolation deepspeed==0.19.8

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
