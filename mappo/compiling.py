"""The compiler behind the fast paths: a recorded graph of tensor operations as machine code."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from mappo.config import ConfigError


def compile_graph(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A function that does what the graph does with inputs of these shapes and types, but for rounding.

    Results are kept on disk for later processes, in `TORCHINDUCTOR_CACHE_DIR`. Random numbers are those that the
    graph itself would draw.

    Raises:
        ConfigError: there is no compiler.
    """
    with warnings.catch_warnings():  # PyTorch's compiler uses what PyTorch deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        from torch import _inductor  # takes a second, which those who do not compile need not wait
        from torch._inductor.exc import InductorError

        try:
            with torch.no_grad(), _inductor.config.patch(fallback_random=True):
                run: Callable[..., Any] = _inductor.standalone_compile(
                    graph, [*inputs], dynamic_shapes="from_example_inputs"
                )
        except InductorError as error:
            raise ConfigError(
                "collection.simulation = fast and learner.update = fast or mixed need a C++ compiler and Python's "
                f"headers (sudo apt install g++ python3-dev), or be plain: {str(error).partition(chr(10))[0]}"
            ) from error
    return run
