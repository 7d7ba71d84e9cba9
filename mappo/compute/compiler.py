"""The compiler behind the fast paths: it turns a traced graph of tensor operations into machine code.

For the CPU, PyTorch's AOTInductor compiles the graph to a shared library, which runs without Python between
its operations. The compiler runs in its own process, `python -m mappo.compute.compiler`, because it never
frees the memory that it has taken. For a GPU, PyTorch's Inductor compiles kernels, whose launches become one
CUDA graph (see `cuda_graphs`). `library_cache` keeps compiled code for later processes.
"""

import copy
import hashlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx._graph_pickler import GraphPickler, Options
from torch.fx.experimental.proxy_tensor import make_fx

from mappo.compute.cuda_graphs import Function
from mappo.compute.library_cache import add_library, building, cache_directory, find_library, remove_library
from mappo.compute.resources import cpu_limit, free_memory_bytes
from mappo.errors import CompilationFailed

_log = logging.getLogger(__name__)
COMPILER_BYTES = 1 << 30  # memory of a compilation; 0.86 GiB were measured
# One compilation more than CPUs: the graph of the simulation comes last and takes longest.
_slots = threading.BoundedSemaphore(
    max(1, min(cpu_limit() + 1, free_memory_bytes(torch.device("cpu")) // COMPILER_BYTES))
)
_NO_COMPILER = 3  # exit status of the compiler's process
_STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGALRM  # the last one ends a trial that takes too long
_OPTIONS = {
    "fallback_random": True,
    # The wrapper only calls kernels, once each: without optimisation it is compiled in two thirds of the time, and
    # a call takes 0.04 ms longer. Precompiled headers take 15 s and 300 MB to make, and save 4 s a graph.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
}
PICKLING = Options(ops_filter=None, node_metadata_key_filter=lambda _: False)  # pickles no metadata of nodes


def trace_graph(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    replacements: Mapping[OpOverload, Callable[..., Any]] = MappingProxyType({}),
) -> GraphModule:
    """Trace a function on tensors of the same shapes and types as `inputs` and return its graph.

    `replacements` maps operations to the functions that are traced in their place. Signals that stop are
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
    """End the tracing if a signal that stops has arrived. Call this function where Python may raise exceptions."""
    if _received_signals:
        raise _Stopped


_received_signals: list[int] = []


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Deliver signals that stop only when the block ends; a signal that the process ignores stays ignored.

    During tracing, PyTorch's C++ code calls Python in places where an exception must not leave Python. An
    exception raised there by a signal handler would abort the process with SIGABRT.
    """
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield
        return
    handlers = {
        stop: signal.signal(stop, lambda number, _: _received_signals.append(number))
        for stop in _STOP_SIGNALS
        if signal.getsignal(stop) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for stop, handler in handlers.items():
            signal.signal(stop, handler)
        # One that ends the process goes before SIGALRM, which ends a trial.
        received = sorted(_received_signals, key=lambda number: number == signal.SIGALRM)[:1]
        _received_signals.clear()
        for number in received:
            signal.raise_signal(number)


class Compiled:
    """A compiled graph. Its code may still be in the making; the first call waits for it.

    signature: the shape, type and device of each input.
    """

    _library: "_Library | None"
    _run: Function | None

    def __init__(self, graph: GraphModule, inputs: Sequence[Tensor]):
        self.signature = _signature(inputs)
        self._library, self._run = None, None
        if inputs[0].is_cuda:
            self._run = _compile_for_gpu(graph, [*inputs])
        else:
            self._library = _Library(graph, self.signature)

    def digest(self) -> str | None:
        """Return the SHA-256 of the machine code. It is None on a GPU, and as long as the code is not there."""
        return self._library.digest() if self._library else None

    def wait(self) -> None:
        """Wait until the code is there.

        Raises:
            CompilationFailed: the compiler is missing or failed.
        """
        if self._run is None and self._library:
            self._run = self._library.load()

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Return the graph's results, except for rounding; draw the same random numbers."""
        if _signature(tensors) != self.signature:
            raise TypeError("compiled for tensors of other shapes, types or devices")
        self.wait()
        assert self._run is not None
        return self._run(*(tensor.contiguous() for tensor in tensors))


def compile_graph(graph: GraphModule, inputs: Sequence[Tensor]) -> Compiled:
    """Start to compile a graph for the shapes, types and devices of `inputs`; return the compiled function.

    For a CPU, several graphs are compiled at the same time. For a GPU, the function returns when the graph is
    compiled.

    Raises:
        CompilationFailed: for a GPU, no compiler is installed. For a CPU, the first call raises it.
    """
    return Compiled(graph, inputs)


def _signature(tensors: Sequence[Tensor]) -> list[Any]:
    return [(tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors]


def _compile_for_gpu(graph: GraphModule, inputs: list[Tensor]) -> Function:
    """Compile in this process. Python still launches every kernel until `CudaGraphed` captures the launches."""
    from torch._inductor import compile
    from torch._inductor.exc import GPUTooOldForTriton, InductorError, TritonMissing

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_directory())
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


class _Library:
    """A shared library of a graph for the CPU, from the cache or from a compiler in another process."""

    _thread: threading.Thread | None

    def __init__(self, graph: GraphModule, signature: list[Any]):
        self._name, self._graph, self._signature = _digest(graph, signature), graph, signature
        self._error: Exception | None = None
        self._start()

    def _start(self) -> None:
        """Start to compile, unless the cache has the library."""
        self._thread = None
        if not find_library(self._name):
            # Pickled here and not in the thread, because this thread goes on tracing.
            graph = GraphPickler.dumps(self._graph, PICKLING)
            request = pickle.dumps((graph, self._signature, torch.get_num_threads()))
            self._thread = threading.Thread(target=self._make, args=(request,), daemon=True)
            self._thread.start()

    def load(self) -> Function:
        """Wait for the library and load it; compile it again if the file in the cache is damaged."""
        self._join()
        try:
            return self._run()
        except RuntimeError as error:
            _log.warning("a compiled library is damaged and is compiled again: %s", error)
            remove_library(self._name)
            self._start()
            self._join()
        try:
            return self._run()
        except RuntimeError as error:
            raise CompilationFailed(
                f"a compiled library cannot be loaded: {error}; if {cache_directory()} lies in a file system "
                "without the right to execute (noexec), set TORCHINDUCTOR_CACHE_DIR to another directory"
            ) from error

    def digest(self) -> str | None:
        file = self._file()
        return hashlib.sha256(file.read_bytes()).hexdigest() if file else None

    def _file(self) -> Path | None:
        directory = find_library(self._name)
        return directory and next(directory.glob("*.so"), None)

    def _run(self) -> Function:
        file = self._file()
        if file is None:
            raise RuntimeError("its file is missing")
        # PyTorch's public loader would leave a copy of the library in the temporary directory.
        run = torch._C._aoti.AOTIModelContainerRunnerCpu(str(file), 1).run
        return lambda *tensors: run([*tensors])

    def _join(self) -> None:
        if self._thread:
            self._thread.join()
        if self._error:
            raise self._error

    def _make(self, request: bytes) -> None:
        try:
            with _slots, building(self._name) as directory:
                if not find_library(self._name):  # another process may have compiled it meanwhile
                    add_library(self._name, _compile_in_process(request, directory))
        except Exception as error:
            self._error = error


def _digest(graph: GraphModule, signature: list[Any]) -> str:
    """Return the library's name in the cache: a hash of everything that the compiled code depends on."""
    capabilities = torch.cpu.get_capabilities()
    processor = capabilities.get("cpu_name"), sorted(name for name, value in capabilities.items() if value is True)
    known = graph.code, signature, torch.__version__, processor, torch.get_num_threads(), sorted(_OPTIONS.items())
    digest = hashlib.sha256(repr(known).encode())
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            constant: Tensor = getattr(graph, node.target)
            digest.update(repr((constant.shape, constant.dtype)).encode())
            digest.update(constant.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _compile_in_process(request: bytes, directory: Path) -> list[Path]:
    """Compile a graph in another process, which writes only into `directory`; return the files of the library.

    Raises:
        CompilationFailed: the compiler is missing or failed.
    """
    temporary = {name: str(directory) for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR")}
    process = subprocess.run(
        [sys.executable, "-m", "mappo.compute.compiler", str(directory), str(os.getpid())],
        input=request,
        capture_output=True,
        check=False,
        env={**os.environ, **temporary},
    )
    message = process.stderr.decode(errors="replace").strip()
    if process.returncode == _NO_COMPILER:
        raise _no_compiler(message.splitlines()[-1])
    if process.returncode:
        raise CompilationFailed(
            f"the compiler's process ended with exit status {process.returncode} (-9: killed, often because "
            f"memory ran out):\n{message}"
        )
    return [file for file in directory.glob("output/*") if file.suffix in (".so", ".json")]


def _no_compiler(reason: str) -> CompilationFailed:
    return CompilationFailed(
        "collection.simulation = fast and learner.update = fast or mixed need a C++ compiler and Python's headers "
        f"(sudo apt install g++ python3-dev); without them, both options must be plain or auto: {reason}"
    )


def main() -> None:
    """Read a graph, the signature of its inputs and the number of threads from standard input; compile the graph.

    The arguments are the directory to write into and the process that waits; without it, this process ends.
    GraphPickler is needed because plain pickling traces the graph again, which would freeze its random numbers.
    """
    directory, parent = sys.argv[1:]
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    _ignore_deprecations()
    from torch._inductor import aot_compile
    from torch._inductor import config as inductor
    from torch._inductor.exc import InductorError

    inductor.cpp.vec_isa_ok = True  # otherwise, test programs for each instruction set are compiled: 10 s
    pickled, signature, threads = pickle.load(sys.stdin.buffer)  # noqa: S301  sent by the parent process
    graph = cast(GraphModule, GraphPickler.loads(pickled, FakeTensorMode()))
    torch.set_num_threads(threads)
    inputs = tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in signature)
    try:
        with torch.no_grad():
            aot_compile(graph, inputs, options={**_OPTIONS, "aot_inductor.output_path": f"{directory}/output"})
    except InductorError as error:
        print(str(error).partition("\n")[0], file=sys.stderr)
        sys.exit(_NO_COMPILER)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _ignore_deprecations() -> None:
    # PyTorch's compiler calls functions that PyTorch itself deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)


if __name__ == "__main__":
    main()
