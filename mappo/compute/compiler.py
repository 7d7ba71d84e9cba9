"""The compiler behind the fast paths: it turns a traced graph of tensor operations into machine code.

For the CPU, PyTorch's AOTInductor makes a library of a graph, which runs without Python between its operations. It
runs in a process of its own, `python -m mappo.compute.compiler`, since a compiler that has been used stays in
memory. For a GPU, PyTorch's Inductor compiles kernels, whose launches become one CUDA graph (see `cuda_graphs`).
Compiled code is kept in `TORCHINDUCTOR_CACHE_DIR`, where later processes find it.
"""

import copy
import hashlib
import pickle
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx._graph_pickler import GraphPickler, Options
from torch.fx.experimental.proxy_tensor import make_fx

from mappo.compute.cuda_graphs import Function
from mappo.errors import ConfigError

_NO_COMPILER = 3  # exit status
_ENDING = signal.SIGINT, signal.SIGTERM
_NODES = Options(ops_filter=None, node_metadata_key_filter=lambda _: False)


def trace_graph(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    replaced: Mapping[OpOverload, Callable[..., Any]] = MappingProxyType({}),
) -> GraphModule:
    """The graph of what a function does with tensors like these; some operations may be replaced by others.

    Who asks this process to end is heard afterwards.
    """
    shapes = FakeTensorMode(allow_fallback_kernels=True)  # or each node has one, which takes as long as the rest
    with _signals_wait(), tracing(TracingContext(shapes)):
        graph: GraphModule = make_fx(function, dict(replaced))(*inputs)
    return graph


@contextmanager
def _signals_wait() -> Iterator[None]:
    """SIGINT and SIGTERM come when the block is left.

    While functions are recorded, PyTorch's C++ code calls Python in places that no exception may leave: one ends
    the process there, with SIGABRT.
    """
    if threading.current_thread() is not threading.main_thread():  # the one that signals come to
        yield
        return
    came: list[int] = []
    before = {each: signal.signal(each, lambda number, _: came.append(number)) for each in _ENDING}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def compile_graph(graph: GraphModule, inputs: list[Tensor]) -> Function:
    """A function that does what the graph does with inputs of these shapes and types, but for rounding.

    Random numbers are those that the graph itself would draw.

    Raises:
        ConfigError: there is no compiler.
    """
    kinds = [(tuple(each.shape), each.dtype, each.device) for each in inputs]
    run = _compile_for_gpu(graph, inputs) if inputs[0].is_cuda else _load(_library(graph, kinds))

    def call(*tensors: Tensor) -> Sequence[Tensor]:
        if [(tuple(each.shape), each.dtype, each.device) for each in tensors] != kinds:
            raise TypeError("compiled for tensors of other shapes, types or devices")
        return run(*(each.contiguous() for each in tensors))

    return call


def _compile_for_gpu(graph: GraphModule, inputs: list[Tensor]) -> Function:
    """In this process: Python is left between its operations, which `Launched` records."""
    from torch._inductor import compile
    from torch._inductor.exc import GPUTooOldForTriton, InductorError, TritonMissing

    bare = copy.deepcopy(graph)
    for node in bare.graph.nodes:
        node.meta = {}  # of the tensors that it was recorded with
    like = [torch.zeros_like(each, memory_format=torch.contiguous_format) for each in inputs]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            _ignore_deprecations()
            return cast(Function, compile(bare, [*like], {"fallback_random": True}))
    except (InductorError, TritonMissing, GPUTooOldForTriton) as error:
        raise _no_compiler(str(error).partition("\n")[0]) from error


def _library(graph: GraphModule, kinds: list[Any]) -> Path:
    """For the CPU, made ahead of time unless it is there."""
    compiled = Path(cache_dir()) / "mappo" / _digest(graph, kinds)
    if not compiled.exists():
        _compile_elsewhere(graph, kinds, compiled)
    [library] = compiled.glob("*.so")
    return library


def _digest(graph: GraphModule, kinds: list[Any]) -> str:
    """A name for what the compiler makes: of all that this depends on."""
    machine = torch.cpu.get_capabilities(), torch.get_num_threads()
    digest = hashlib.sha256(repr((graph.code, kinds, torch.__version__, machine)).encode())
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            constant: Tensor = getattr(graph, node.target)
            digest.update(repr((constant.shape, constant.dtype)).encode())
            digest.update(constant.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load(library: Path) -> Function:
    """PyTorch's public function for it leaves a copy of the library in the temporary directory."""
    run = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1).run
    return lambda *tensors: run([*tensors])


def _compile_elsewhere(graph: GraphModule, kinds: list[Any], compiled: Path) -> None:
    """Let `compiled` be a directory with the library, and what it reads.

    The compiler is told where: by itself it gives graphs that differ in constants alone the same name. And plain
    pickling would trace the graph anew, and draw its random numbers once and for all.
    """
    compiled.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=compiled.parent) as directory:
        made = Path(directory) / "made"
        done = subprocess.run(
            [sys.executable, "-m", "mappo.compute.compiler"],
            input=pickle.dumps((GraphPickler.dumps(graph, _NODES), kinds, torch.get_num_threads(), str(made))),
            capture_output=True,
            check=False,
        )
        said = done.stderr.decode(errors="replace").strip()
        if done.returncode == _NO_COMPILER:
            raise _no_compiler(said.splitlines()[-1])
        if done.returncode:
            raise RuntimeError(f"the compiler's process ended with {done.returncode}:\n{said}")
        try:
            made.rename(compiled)
        except OSError:
            if not compiled.exists():  # it is there if another process was faster
                raise


def _no_compiler(reason: str) -> ConfigError:
    return ConfigError(
        "collection.simulation = fast and learner.update = fast or mixed need a C++ compiler and Python's headers "
        f"(sudo apt install g++ python3-dev), or be plain: {reason}"
    )


def main() -> None:
    """Compile what standard input says: a graph, its inputs, the number of threads, and where to."""
    _ignore_deprecations()
    from torch._inductor import aot_compile
    from torch._inductor.exc import InductorError

    pickled, kinds, threads, made = pickle.load(sys.stdin.buffer)  # noqa: S301  from the process that began this
    graph = cast(GraphModule, GraphPickler.loads(pickled, FakeTensorMode()))
    torch.set_num_threads(threads)
    inputs = tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in kinds)
    options = {"fallback_random": True, "aot_inductor.output_path": made}
    try:
        with torch.no_grad():
            aot_compile(graph, inputs, options=options)
    except InductorError as error:
        print(str(error).partition("\n")[0], file=sys.stderr)
        sys.exit(_NO_COMPILER)


def _ignore_deprecations() -> None:
    """PyTorch's compiler uses what PyTorch deprecates."""
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)


if __name__ == "__main__":
    main()
