# The commands of the README. Each sets up .venv first, with the versions of constraints.txt.
PYTHON ?= python3
# With PYTHONDONTWRITEBYTECODE every program that a test starts would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

BENCH_STAMP := $(VENV)/.installed-bench

CUDA_VENV := .cuda-venv
CUDA_STAMP := $(CUDA_VENV)/.installed

REFERENCES_STAMP := $(VENV)/.installed-references

.PHONY: demo demo-unclip test test-all fuzz faults references js-client fake-cuda gpu bench bench-plan bench-scale bench-family lint clean

demo: $(STAMP)
	$(BIN)/dalle-train demo --out runs/demo

# Then DALL·E 2's prior and decoder on the same world, with tables and sheets in runs/demo/unclip; see docs/dalle2.md.
demo-unclip: $(STAMP)
	$(BIN)/dalle-train demo --unclip --out runs/demo

# A process for each core: the tests' models are too small for threads. Those of one file share what they trained.
test: $(STAMP)
	$(BIN)/python -m pytest -n logical --dist loadfile

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu"

# Thousands of odd and damaged inputs at every door, with a table of what came out; see docs/data.md.
fuzz: $(STAMP)
	$(BIN)/python -m pytest tests/fuzz -m slow

# Kills, signals, hangs, full disks and damaged shards, injected into real runs on two ranks; see docs/faults.md.
faults: $(STAMP)
	$(BIN)/python tests/faults

# What runs on a GPU, on one that is not there, with the CUDA build of torch; see docs/performance.md.
fake-cuda: $(CUDA_STAMP)
	$(CUDA_VENV)/bin/python -m pytest -m "not gpu" tests/fake_cuda

# On an NVIDIA GPU: checks, times, and writes the results, in about ten minutes.
gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu

# Imported models beside the packages that published them; without those, these tests are skipped.
references: $(REFERENCES_STAMP)
	PYTHONPATH=$(VENV)/published $(BIN)/python -m pytest tests/dvae/test_openai.py tests/importers

# Every program compares in one process of its own; about half an hour on two cores. See benchmarks/README.md.
bench: $(BENCH_STAMP)
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.dvae
	$(BIN)/python -m benchmarks.loading
	$(BIN)/python -m benchmarks.tokenizer
	$(BIN)/python -m benchmarks.summary --page

# What `dalle-train plan` predicts beside measured memory, communication and checkpoints; a quarter of an hour, and 10 GiB.
bench-plan: $(STAMP)
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.costs
	$(BIN)/python -m benchmarks.zero3_memory

# Memory, start and order of a rank at 250 million samples, on simulated shards; a few minutes.
bench-scale: $(STAMP)
	$(BIN)/python -m benchmarks.scale

# Imported models beside the packages that published them; half an hour, and 10 GiB.
bench-family: $(REFERENCES_STAMP)
	$(BIN)/python -m benchmarks.family

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dalle dvae rerank storage training unclip benchmarks
	$(BIN)/vulture
	$(BIN)/codespell

# DeepSpeed comes as source: DS_BUILD_OPS=0 builds it without compiling anything, without torch, and without asking for a GPU.
$(STAMP): pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# The CUDA build of torch, 6 GB with its libraries, beside everything else of .venv. `===` refuses the CPU build.
$(CUDA_STAMP): $(STAMP)
	$(PYTHON) -m venv --clear $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check "torch===$$(sed -n 's/^torch==//p' constraints.txt)"
	packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(BIN)/python -c "$$packages" > "$$($(CUDA_VENV)/bin/python -c "$$packages")/everything_else.pth"
	touch $@

# OpenAI's client for JavaScript, for one test of the server; it needs npm.
js-client: $(STAMP)
	npm install --silent --no-audit --no-fund --prefix $(VENV)/js openai@6.49.0

# The peers beside the virtual environment's own packages, without what they depend on: see benchmarks/peers.txt.
$(BENCH_STAMP): $(STAMP) benchmarks/peers.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/peers -r benchmarks/peers.txt
	touch $@

# Apart from the virtual environment's own packages, and without their dependencies, of which torchvision is one.
$(REFERENCES_STAMP): $(STAMP) tests/references.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(VENV)/published attrs==26.1.0 requests==2.34.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(VENV)/published --no-deps -r tests/references.txt
	touch $@

clean:
	rm -rf $(VENV) $(CUDA_VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
