#!/usr/bin/env bash
# Test and measure on a machine with a GPU that has its own PyTorch and no network, in under eight minutes.
#
#   bash benchmarks/gpu.sh prepare       # first, on a machine with network: download wheels into wheels/
#   bash benchmarks/gpu.sh [DIRECTORY]   # on the GPU machine, with wheels/; results go to DIRECTORY (docs/results)
#
# BenchMARL needs another TorchRL than mappo, so each gets its own environment, on top of the machine's PyTorch.
# PYTHON selects an interpreter that can import torch; DEVICE=cpu rehearses the script without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
PYTHON_VERSION=${PYTHON_VERSION:-3.12} # of the GPU machine
BENCHMARL=.venv-benchmarl

prepare() {
    rm -rf wheels && mkdir -p wheels/mappo wheels/benchmarl
    download wheels/mappo -c constraints.txt torchrl tensordict vmas pydantic safetensors scipy pytest
    download wheels/benchmarl -r benchmarks/requirements-benchmarl.txt
    du -sh wheels
}

download() { # download DIRECTORY REQUIREMENTS...: the wheels that these need, but for torch and what torch needs
    local directory=$1 needed
    shift
    needed=$("$PYTHON" -m pip install -q --dry-run --ignore-installed --report - "$@" | "$PYTHON" -c '
import json, re, sys
own = re.compile("(torch|torchvision|sympy|mpmath|networkx|jinja2|markupsafe|filelock|fsspec|setuptools|numpy|pillow|av|pygments)$|nvidia|triton|cuda")
for item in json.load(sys.stdin)["install"]:
    name, version = (item["metadata"][key] for key in ("name", "version"))
    if not own.match(name.lower()):
        print(f"{name}=={version}")')
    for requirement in $needed; do
        "$PYTHON" -m pip download -q --no-deps --only-binary :all: --python-version "$PYTHON_VERSION" \
            -d "$directory" "$requirement" 2>/dev/null \
            || "$PYTHON" -m pip wheel -q --no-deps -w "$directory" "$requirement" # published as source only
    done
}

install() { # install ENVIRONMENT WHEELS...: on top of the machine's own packages
    local environment=$1
    shift
    "$PYTHON" -m venv --clear --system-site-packages "$environment"
    local site packages
    site=$("$PYTHON" -c 'import site, sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")')
    packages=$(echo "$environment"/lib/python3*/site-packages)
    echo "$site" >"$packages/machine.pth" # also where the interpreter is a virtual environment itself
    local links=()
    for wheels in "$@"; do links+=(--find-links "$wheels"); done
    "$environment/bin/python" -m pip install -q --disable-pip-version-check --ignore-installed --no-index --no-deps "${links[@]}" \
        $(find "$@" -name '*.whl' -printf '%f\n' | sed 's/-.*//' | sort -u)
}

measure() { # measure COMMAND...: append a command and its output to the results
    echo "\$ python $*" >>"$RESULTS"
    timeout 240 .venv-gpu/bin/python "$@" 2>>"$RESULTS.log" | tee -a "$RESULTS" || echo "ended with status $?" >>"$RESULTS"
    echo >>"$RESULTS"
}

if [ "${1:-}" = prepare ]; then
    prepare
    exit
fi

OUTPUT=${1:-docs/results}
mkdir -p "$OUTPUT"
RESULTS=$OUTPUT/throughput-gpu.txt
: >"$RESULTS"
: >"$RESULTS.log"
install .venv-gpu wheels/mappo
install "$BENCHMARL" wheels/benchmarl
export PYTHONPATH=$PWD

if [ "$DEVICE" = cuda ]; then
    measure -m pytest --noconftest -q tests/test_gpu.py
    measure -m benchmarks.throughput benchmarl-fine-tuned --iterations 4 \
        --contenders "BenchMARL,mappo plain,mappo fast,mappo mixed"
    measure -m benchmarks.throughput gpu --iterations 4 --contenders "mappo plain,mappo fast,mappo mixed" \
        --collection.num-envs 4096
else # a rehearsal of the same commands, small
    measure -m benchmarks.throughput benchmarl-fine-tuned --iterations 2 --contenders "BenchMARL,mappo plain" \
        --device cpu --collection.num-envs 20 --learner.epochs 1 --learner.minibatch-frames 500 --tolerance 9
fi
echo "results: $RESULTS; messages: $RESULTS.log"
