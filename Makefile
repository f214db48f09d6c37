PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-fast test-xla torture bench check deepspeed clean

# Train, evaluate, save and predict on the built-in corpus and model: no hub, no account.
demo: $(VENV)/.installed
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train_mrpc.py --demo --overwrite_output_dir

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Without the tests that start the script, Slurm or a browser in processes of their own.
test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not processes"

# On torch_xla, in an environment of its own, of 8 GB: it has no release for newer versions of torch,
# and does not import without the libraries for NVIDIA GPUs.
test-xla: $(VENV)-xla/.installed
	PJRT_DEVICE=CPU $(VENV)-xla/bin/python -m pytest tests/backends/test_xla.py

# Killed twenty times for each number of processes and accumulation, and for each backend that
# shards, instead of a few times.
torture: $(VENV)/.installed-dev
	TORTURE_KILLS=20 $(BIN)/python -m pytest -k killed_anywhere

# For the tests of accelerate_configs/deepspeed_zero2.yaml, which are skipped without it. Its build
# imports PyTorch, so it must not be isolated from the environment.
deepspeed: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet "setuptools<81"
	DS_ACCELERATOR=cpu $(BIN)/pip install --quiet --no-build-isolation deepspeed==0.19.8

# The figures of docs/benchmarks.md that need no GPU, in about an hour on two idle cores: make bench
# MODEL=DIR DATA=DIR, with folders of a BERT and of MRPC. The pictures go to outputs/.
MRPC  := --dataset_name $(DATA) --model_name_or_path $(MODEL)
BENCH := $(BIN)/python -m benchmarks
bench: $(VENV)/.installed-dev
	test -d "$(MODEL)" -a -d "$(DATA)"
	mkdir -p outputs
	$(BENCH).compare $(MRPC)
	$(BENCH).compare $(MRPC) --mixed_precision auto
	$(BENCH).matmul --plot outputs/update_time.png
	$(BENCH).overheads
	$(BENCH).scale --model_name_or_path $(MODEL) --rows 4000 40000 400000
	OMP_NUM_THREADS=1 $(BENCH).dealing --rows 4000 40000 400000 4000000 --processes 1 8 64 \
		--plot outputs/scale.png
	$(BENCH).batches $(MRPC) --shown 2 8 64 --plot outputs/batches.png
	OMP_NUM_THREADS=1 $(BENCH).checkpoints --sizes minilm base large
	OMP_NUM_THREADS=2 $(BENCH).checkpoints --sizes minilm base large
	$(BENCH).heartbeat

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

$(VENV)-xla/.installed: requirements.txt requirements-dev.txt
	test -x $(VENV)-xla/bin/python || $(PYTHON) -m venv $(VENV)-xla
	grep -v '^torch==' requirements.txt | \
		$(VENV)-xla/bin/pip install --quiet torch==2.9.0 torch_xla==2.9.0 -r /dev/stdin
	$(VENV)-xla/bin/pip install --quiet $$(grep '^pytest==' requirements-dev.txt)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-xla .mypy_cache .pytest_cache .ruff_cache
