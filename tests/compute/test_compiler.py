"""Compiled graphs against the functions that they were recorded from, run by PyTorch."""

import signal
import sys

import pytest
import torch

from mappo.compute.compiler import compile_graph, trace_graph


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_compiled_graph_does_what_the_function_does(factor, monkeypatch):
    """Random numbers and constants, in this process and, without the compiler, in a later one."""

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
    monkeypatch.setattr("mappo.compute.compiler._compile_elsewhere", None)
    later = compile_graph(graph, [values])
    compare(later, function, values.flip(0))
    assert torch.equal(later(values.t().contiguous().t())[0], function(values)[0])
    with pytest.raises(TypeError, match="other shapes"):
        later(values[:20])


def compare(compiled, function, values):
    torch.manual_seed(0)
    expected, state = function(values), torch.get_rng_state()
    torch.manual_seed(0)
    for one, other in zip(compiled(values), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_who_asks_to_end_while_a_function_is_recorded_is_heard_when_it_is(number, raised):
    """An exception may come to C++ code of PyTorch there that ends the process upon it."""

    def end(*_):
        sys.exit(143)

    def double(values):
        signal.raise_signal(number)
        reached.append(True)
        return 2 * values

    reached, before = [], signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(raised):
            trace_graph(double, [torch.ones(2)])
        assert reached
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
