# Every target installs what it needs. `make help` lists the targets.
# PYTHON=python3.12 selects the interpreter, TORCH_INDEX=URL another build of torch; ARGS="..." adds arguments to the
# command of a target.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test test-long bench observe image check format generate lock clean

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

IMAGE ?= mappo:$(shell sed -nE 's/^__version__ = "(.*)"/\1/p' mappo/__init__.py)-$(VARIANT)
VARIANT ?= cpu
BASE_IMAGE ?=
EXTRAS ?=
BUILDER ?= $(shell docker info >/dev/null 2>&1 && echo docker || command -v podman || command -v buildah)
PIP_CONF ?=

IMAGE_OPTIONS = $(if $(filter cuda,$(VARIANT)),--build-arg TORCH_INDEX=https://pypi.org/simple) \
    $(if $(TORCH_INDEX),--build-arg TORCH_INDEX="$(TORCH_INDEX)") \
    $(if $(BASE_IMAGE),--build-arg BASE_IMAGE="$(BASE_IMAGE)") \
    $(if $(EXTRAS),--build-arg EXTRAS="$(EXTRAS)") \
    $(if $(PIP_CONF),--secret id=pip$(,)src="$(PIP_CONF)") \
    --build-arg VERSION="$(shell git describe --tags --always --dirty)" \
    --build-arg REVISION="$(shell git rev-parse HEAD)" \
    --build-arg CREATED="$(shell git log -1 --format=%cI)" $(ARGS)
, := ,

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := mappo components pipelines k8s tests benchmarks
APT := sudo apt install python3 python3-venv build-essential

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 18

run: $(INSTALLED) ## run the training pipeline on this machine: validate, train, evaluate (ARGS="balance --seed 3")
	@$(BIN)/python -m pipelines run $(ARGS)

test: check ## run checks and tests, about 12 minutes on 2 cores (ARGS="-k learner" selects some)
	@$(BIN)/python -m pytest -n 3 --dist loadfile -m "not long" $(ARGS)

test-long: $(INSTALLED) ## run the tests that take minutes each, such as learning and recovery from kills, two hours
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m long $(ARGS)

bench: $(INSTALLED) .venv-benchmarl/.installed ## measure the speed, compared with BenchMARL and TorchRL, under 15 minutes (ARGS=--full)
	@$(BIN)/python -m benchmarks $(ARGS)

image: ## build the container image with docker, podman or buildah (VARIANT=cuda IMAGE=registry/mappo:1 EXTRAS=mlflow PIP_CONF=pip.conf)
	@test -n "$(BUILDER)" || { echo "No docker, podman or buildah: sudo apt install buildah"; exit 1; }
	@case "$(VARIANT)" in cpu|cuda) ;; *) echo "VARIANT=$(VARIANT): must be cpu or cuda"; exit 1;; esac
	$(BUILDER) build --tag "$(IMAGE)" $(IMAGE_OPTIONS) .

check: $(INSTALLED) ## check format, lint rules, types and import contracts
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(INSTALLED) ## format the sources and fix lint errors
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

generate: $(INSTALLED) ## generate dashboards, PrometheusRule and docs/metrics.md
	@$(BIN)/python -m k8s.generate

observe: $(INSTALLED) ## run the pipeline on this machine with a Prometheus and a Pushgateway (ARGS="balance")
	@$(BIN)/python -m pipelines observe $(ARGS)

lock: ## write the newest versions that pyproject.toml allows to constraints.txt
	@rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	@$(VENV)-lock/bin/python -m pip install -q --upgrade pip setuptools wheel
	@PYTHONWARNINGS="ignore:Editable installation" \
	    $(VENV)-lock/bin/python -m pip install -q --no-build-isolation -e ".[kubeflow,tensorboard,mlflow,onnx,image,dev]"
	@$(VENV)-lock/bin/python -m pip freeze --all --exclude-editable | sed -E 's/^(torch==[0-9.]+)\+.*/\1/' > constraints.txt
	@rm -rf $(VENV)-lock

clean: ## remove the virtual environment and caches, but not runs/
	@rm -rf $(VENV) .venv-benchmarl *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

.venv-benchmarl/.installed: benchmarks/requirements-benchmarl.txt
	@echo "Installing BenchMARL into its own environment, .venv-benchmarl, since it needs an older TorchRL ..."
	@$(PYTHON) -m venv --clear .venv-benchmarl
	@if [ -n "$(TORCH_INDEX)" ]; then .venv-benchmarl/bin/pip install -q --index-url "$(TORCH_INDEX)" torch==2.13.0; fi
	@.venv-benchmarl/bin/pip --disable-pip-version-check install -q -r benchmarks/requirements-benchmarl.txt
	@touch $@

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) must be Python 3.11 or newer: $(APT), or make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "$(PYTHON) has no venv module: $(APT)"; exit 1; }
	@command -v cc >/dev/null || \
	    echo "Note: no C compiler found. A package without a wheel for this machine would need one: $(APT)"
	@echo "Installing into $(VENV) (a minute or two, once) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install -q -c constraints.txt pip setuptools wheel
	@if [ -n "$(TORCH_INDEX)" ]; then $(PIP) install -q -c constraints.txt --no-deps --index-url "$(TORCH_INDEX)" torch; fi
	@PYTHONWARNINGS="ignore:Editable installation" \
	    $(PIP) install -q --no-build-isolation -c constraints.txt -e ".[kubeflow,tensorboard,mlflow,onnx,dev]"
	@touch $@
