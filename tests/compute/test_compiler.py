"""Check that compiled graphs give the results of the functions from which they were traced."""

import signal
import sys

import pytest
import torch

from mappo.compute.compiler import compile_graph, trace_graph


@pytest.mark.parametrize("factor", [2.0, pytest.param(3.0, marks=pytest.mark.long)])
def test_compiled_graph_gives_the_results_of_the_function(factor, monkeypatch):
    """Random numbers and constants are the same, also when the library comes from the cache."""

    def function(values):
        shape = values.shape
        return [
            values * torch.tensor([1.0, 1.0, factor]),
            torch.randn(shape),
            torch.rand(shape),
            torch.randint(0, 5, shape),
            torch.rand_like(values),
            torch.empty_like(values).uniform_(-1, 1),
            torch.normal(values, torch.ones_like(values)),
            torch.bernoulli(values.clamp(0, 1)),
            torch.multinomial(values.abs() + 1, 1),
        ]

    values = torch.linspace(-1, 1, 120).reshape(40, 3)
    graph = trace_graph(function, [values])
    compare(compile_graph(graph, [values]), function, values)
    monkeypatch.setattr("mappo.compute.compiler._compile_in_process", None)  # the compiler must not run again
    cached = compile_graph(graph, [values])
    compare(cached, function, values.flip(0))
    assert torch.equal(cached(values.t().contiguous().t())[0], function(values)[0])
    with pytest.raises(TypeError, match="other shapes"):
        cached(values[:20])


def compare(compiled, function, values):
    torch.manual_seed(0)
    expected, state = function(values), torch.get_rng_state()
    torch.manual_seed(0)
    for actual, wanted in zip(compiled(values), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("number", "exception"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_signal_that_arrives_during_tracing_is_delivered_afterwards(number, exception):
    """An exception during tracing may reach PyTorch's C++ code, which would abort the process."""

    def stop(*_):
        sys.exit(143)

    def double(values):
        signal.raise_signal(number)
        is_finished.append(True)
        return 2 * values

    is_finished, previous_handler = [], signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(exception):
            trace_graph(double, [torch.ones(2)])
        assert is_finished
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
