"""The compiler behind the fast paths: it turns a traced graph of tensor operations into machine code.

For the CPU, PyTorch's AOTInductor compiles the graph to a shared library, which runs without Python between
its operations. The compiler runs in its own process, `python -m mappo.compute.compiler`, because it never
frees the memory that it has taken. For a GPU, PyTorch's Inductor compiles kernels, whose launches become one
CUDA graph (see `cuda_graphs`). The cache in `TORCHINDUCTOR_CACHE_DIR` keeps compiled code for later
processes.
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

_NO_COMPILER = 3  # exit status of the compiler's process
_STOP_SIGNALS = signal.SIGINT, signal.SIGTERM
_PICKLING = Options(ops_filter=None, node_metadata_key_filter=lambda _: False)  # pickles no metadata of nodes


def trace_graph(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    replacements: Mapping[OpOverload, Callable[..., Any]] = MappingProxyType({}),
) -> GraphModule:
    """Trace a function on tensors of the same shapes and types as `inputs` and return its graph.

    `replacements` maps operations to the functions that are traced in their place. SIGINT and SIGTERM are
    delivered after tracing. A traced function that takes long calls `end_if_stopped` now and then.
    """
    # One fake mode for all nodes: make_fx would create one for each, which doubles the time of tracing.
    fake_mode = FakeTensorMode(allow_fallback_kernels=True)
    with _deferred_signals(), tracing(TracingContext(fake_mode)):
        graph: GraphModule = make_fx(function, dict(replacements))(*inputs)
    return graph


class _Stopped(BaseException):
    """A signal has arrived; `_deferred_signals` delivers it once this exception has ended the tracing."""


def end_if_stopped() -> None:
    """End the tracing if SIGINT or SIGTERM has arrived. Call this function where Python may raise exceptions."""
    if _received_signals:
        raise _Stopped


_received_signals: list[int] = []


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM only when the block ends.

    During tracing, PyTorch's C++ code calls Python in places where an exception must not leave Python. An
    exception raised there by a signal handler would abort the process with SIGABRT.
    """
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield
        return
    handlers = {
        stop: signal.signal(stop, lambda number, _: _received_signals.append(number)) for stop in _STOP_SIGNALS
    }
    try:
        yield
    finally:
        for stop, handler in handlers.items():
            signal.signal(stop, handler)
        received = _received_signals[:1]
        _received_signals.clear()
        for number in received:
            signal.raise_signal(number)


def compile_graph(graph: GraphModule, inputs: list[Tensor]) -> Function:
    """Compile a graph for the shapes, types and devices of `inputs` and return the compiled function.

    The function gives the same results as the graph, except for rounding, and draws the same random numbers.

    Raises:
        ConfigError: no compiler is installed.
    """
    signature = _signature(inputs)
    run = _compile_for_gpu(graph, inputs) if inputs[0].is_cuda else _load(_library(graph, signature))

    def call(*tensors: Tensor) -> Sequence[Tensor]:
        if _signature(tensors) != signature:
            raise TypeError("compiled for tensors of other shapes, types or devices")
        return run(*(tensor.contiguous() for tensor in tensors))

    return call


def _signature(tensors: Sequence[Tensor]) -> list[Any]:
    return [(tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors]


def _compile_for_gpu(graph: GraphModule, inputs: list[Tensor]) -> Function:
    """Compile in this process. Python still launches every kernel until `CudaGraphed` captures the launches."""
    from torch._inductor import compile
    from torch._inductor.exc import GPUTooOldForTriton, InductorError, TritonMissing

    bare = copy.deepcopy(graph)
    for node in bare.graph.nodes:
        node.meta = {}  # drops the tensors of tracing; the compiler computes its own
    examples = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            _ignore_deprecations()
            return cast(Function, compile(bare, [*examples], {"fallback_random": True}))
    except (InductorError, TritonMissing, GPUTooOldForTriton) as error:
        raise _no_compiler(str(error).partition("\n")[0]) from error


def _library(graph: GraphModule, signature: list[Any]) -> Path:
    """Return the shared library of a graph for the CPU; compile it if the cache does not hold it."""
    directory = Path(cache_dir()) / "mappo" / _digest(graph, signature)
    if not directory.exists():
        _compile_in_subprocess(graph, signature, directory)
    [library] = directory.glob("*.so")
    return library


def _digest(graph: GraphModule, signature: list[Any]) -> str:
    """Return the library's name in the cache: a hash of everything that the compiled code depends on."""
    machine = torch.cpu.get_capabilities(), torch.get_num_threads()
    digest = hashlib.sha256(repr((graph.code, signature, torch.__version__, machine)).encode())
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            constant: Tensor = getattr(graph, node.target)
            digest.update(repr((constant.shape, constant.dtype)).encode())
            digest.update(constant.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load(library: Path) -> Function:
    # PyTorch's public loader would leave a copy of the library in the temporary directory.
    run = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1).run
    return lambda *tensors: run([*tensors])


def _compile_in_subprocess(graph: GraphModule, signature: list[Any], directory: Path) -> None:
    """Compile a graph in another process; write the library and the files that it reads into `directory`.

    The output path is explicit because the compiler's own names do not depend on a graph's constants.
    GraphPickler is needed because plain pickling traces the graph again, which would freeze its random
    numbers.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory.parent) as temporary:
        output = Path(temporary) / "output"
        pickled = GraphPickler.dumps(graph, _PICKLING)
        process = subprocess.run(
            [sys.executable, "-m", "mappo.compute.compiler"],
            input=pickle.dumps((pickled, signature, torch.get_num_threads(), str(output))),
            capture_output=True,
            check=False,
        )
        message = process.stderr.decode(errors="replace").strip()
        if process.returncode == _NO_COMPILER:
            raise _no_compiler(message.splitlines()[-1])
        if process.returncode:
            raise RuntimeError(f"the compiler's process ended with exit status {process.returncode}:\n{message}")
        try:
            output.rename(directory)
        except OSError:
            if not directory.exists():  # another process that compiled the same graph may have been faster
                raise


def _no_compiler(reason: str) -> ConfigError:
    return ConfigError(
        "collection.simulation = fast and learner.update = fast or mixed need a C++ compiler and Python's headers "
        f"(sudo apt install g++ python3-dev); without them, both options must be plain: {reason}"
    )


def main() -> None:
    """Read a graph, the signature of its inputs, the number of threads and the output path from standard input.

    Compile the graph to that path.
    """
    _ignore_deprecations()
    from torch._inductor import aot_compile
    from torch._inductor.exc import InductorError

    pickled, signature, threads, output = pickle.load(sys.stdin.buffer)  # noqa: S301  sent by the parent process
    graph = cast(GraphModule, GraphPickler.loads(pickled, FakeTensorMode()))
    torch.set_num_threads(threads)
    inputs = tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in signature)
    options = {"fallback_random": True, "aot_inductor.output_path": output}
    try:
        with torch.no_grad():
            aot_compile(graph, inputs, options=options)
    except InductorError as error:
        print(str(error).partition("\n")[0], file=sys.stderr)
        sys.exit(_NO_COMPILER)


def _ignore_deprecations() -> None:
    # PyTorch's compiler calls functions that PyTorch itself deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)


if __name__ == "__main__":
    main()
