# make demo   a server, a real model, scored sentences
# make test   lint, types and tests
# make soak   what is too slow for the suite
# make bench  every figure but those of loads, as ratios within one run; peers in ARGS
# make bench-load  loads against the limit of reading and other loaders; options in ARGS
# make bench-beside  a forward pass while another model loads; options in ARGS
# make presets  every preset at its real size, compiled from shapes alone
# make docs   the documentation as a site, in build/site
# make deploy-lint  Dockerfile, Kubernetes manifests and the systemd unit; a part of lint
# make image  the container image, built and run; root on Debian, no engine and no registry; VARIANT=tpu

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3))
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?=
VARIANT ?= cpu
ARGS ?=

.PHONY: demo test lint soak bench bench-load bench-beside presets stubs docs image deploy-lint clean

demo: $(VENV)/demo
	$(BIN)/python examples/demo.py $(MODEL)

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/dev deploy-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code

soak: $(VENV)/dev
	timeout 10800 $(BIN)/python -m pytest -m soak --timeout 1800

bench: $(VENV)/dev
	$(BIN)/python benchmarks/restart.py
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/determinism.py
	$(BIN)/python benchmarks/forward.py $(ARGS)

bench-load: $(VENV)/dev
	$(BIN)/python benchmarks/load.py $(ARGS)

bench-beside: $(VENV)/dev
	$(BIN)/python benchmarks/beside_load.py $(ARGS)

presets: $(VENV)/dev
	$(BIN)/python benchmarks/presets.py

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

image: $(VENV)/demo
	VARIANT=$(VARIANT) PYTHON=$(abspath $(BIN)/python) timeout 1800 deploy/container/test.sh

deploy-lint: $(VENV)/dev
	PATH="$(abspath $(BIN)):$$PATH" deploy/lint.sh

stubs: $(VENV)/dev
	$(BIN)/python -m grpc_tools.protoc --proto_path=proto --python_out=client --pyi_out=client \
	  --grpc_python_out=client proto/moorage/v1/moorage.proto

$(VENV)/demo $(VENV)/dev $(VENV)/docs: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(@F)]"
	@touch $@

clean:
	rm -rf $(VENV)
