"""Measure the parts of an update, and compare them with the matrix multiplications that an update needs.

    python -m benchmarks.update                                   navigation, one thread
    python -m benchmarks.update benchmarl-base --threads 2

A step is one optimiser step on a minibatch: clipped gradients and Adam. `bound` only multiplies matrices of
the same shapes: for each linear layer the output, the gradient of the weights and, except in the first layer,
the gradient of the input; the policy is shared. Ways take turns, a few calls each; a ratio compares times of
the same turn. `off by` is the distance from the gradients of `plain`, relative to the norm of these gradients.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mappo.cli.arguments import add_config_arguments, changes_from_arguments, dashed
from mappo.compute.computation import Way as Update
from mappo.compute.resources import resolve_device
from mappo.config import ExperimentConfig, override
from mappo.environment.environment import make_environment
from mappo.environment.keys import OBSERVATION
from mappo.environment.plain_simulation import PlainSimulation
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.learning.learner import LOSS_INPUTS, Learner
from mappo.learning.networks import Networks, make_networks
from mappo.recipes import DEFAULT_RECIPE, RECIPES, recipe

_CALLS = 5
_UPDATES: tuple[Update, ...] = ("plain", "fast", "mixed")
Way = Callable[[], object]


def main() -> None:
    """Measure all ways and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.update",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser, with_recipe=False)
    parser.usage = "%(prog)s [RECIPE] [--turns N] [--SECTION.FIELD VALUE ...]"
    parser.add_argument("recipe", nargs="?", default=DEFAULT_RECIPE, choices=RECIPES, metavar="RECIPE")
    parser.add_argument(
        "--turns",
        type=int,
        default=25,
        metavar="N",
        help="measured turns of each way (default: 25)",
    )
    arguments = parser.parse_args(dashed(sys.argv[1:]))
    config = override(recipe(arguments.recipe), *changes_from_arguments(arguments))
    if config.networks.has_memory:
        parser.error("the bound has no memory: measure memory with python -m benchmarks.throughput")
    torch.set_num_threads(config.threads or torch.get_num_threads())
    gradients = {update: _gradients(config, update) for update in _UPDATES}
    ways = {f"{name} {update}": way for update in _UPDATES for name, way in _ways(config, update).items()}
    networks, minibatch = _prepared(config)[1:]
    ways["bound"] = _multiplications(networks, minibatch)
    seconds_by_way = _in_turns(ways, arguments.turns)
    print(f"minibatches of {len(minibatch[0])} frames, {torch.get_num_threads()} threads, {config.device}")
    print(f"{'':<16} {'ms':>7} {'x bound':>8} {'least':>6} {'most':>6}")
    for name, seconds in seconds_by_way.items():
        ratios = [value / bound for value, bound in zip(seconds, seconds_by_way["bound"], strict=True)]
        middle, ratio = 1000 * statistics.median(seconds), statistics.median(ratios)
        print(f"{name:<16} {middle:>7.2f} {ratio:>8.2f} {min(ratios):>6.2f} {max(ratios):>6.2f}")
    exact = gradients[_UPDATES[0]]
    for update in _UPDATES[1:]:
        print(f"{update} off by {float((gradients[update] - exact).norm() / exact.norm()):.1g}")


def _prepared(config: ExperimentConfig, update: Update = "plain") -> tuple[Learner, Networks, list[Tensor]]:
    """Return a learner, its networks, and a minibatch of a real batch, which is only as large as necessary."""
    device, frames = resolve_device(config.device), config.learner.minibatch_frames
    with private_random_streams(config.seed, Stream.TRAINING, device):
        environment = make_environment(
            config.environment, config.collection.num_envs, config.seed, Stream.TRAINING, device
        )
        networks = make_networks(config.networks, environment)
        learner = Learner(config.learner, networks, 1, update=update)
        batch, _ = PlainSimulation(environment).collect(
            networks.policy, -(-frames // len(environment.reset())), environment.reset()
        )
        learner._estimate(batch)
    minibatch = learner._prepare_frames(batch)[:frames]
    return learner, networks, [minibatch[key].clone() for key in LOSS_INPUTS]


def _gradients(config: ExperimentConfig, update: Update) -> Tensor:
    """Return the gradients of all parameters on the first minibatch, as one flat tensor."""
    learner, networks, minibatch = _prepared(config, update)
    learner._gradients(*minibatch)
    return torch.cat([value.grad.flatten() for value in networks.modules().parameters() if value.grad is not None])


def _ways(config: ExperimentConfig, update: Update) -> dict[str, Way]:
    """Return functions for the whole step and for its parts."""
    learner, _, minibatch = _prepared(config, update)
    learner._step(*minibatch)
    return {
        "step": lambda: learner._step(*minibatch),
        "gradients": lambda: learner._gradients(*minibatch),
        "Adam": learner.optimiser.step,
    }


def _multiplications(networks: Networks, minibatch: list[Tensor]) -> Way:
    """Return a function that multiplies as the forward and backward passes do, on matrices made in advance."""
    frames, agents = minibatch[LOSS_INPUTS.index(OBSERVATION)].shape[:2]
    matrices = []
    for network, rows in ((networks.policy, frames * agents), (networks.critic, frames)):
        layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
        for index, layer in enumerate(layers):
            weight = layer.weight.detach()
            inputs, outputs = (torch.randn(rows, size, device=weight.device) for size in weight.shape[::-1])
            matrices.append((index == 0, weight, inputs, outputs))

    def multiply() -> None:
        for is_first, weight, inputs, outputs in matrices:
            torch.mm(inputs, weight.t())
            torch.mm(outputs.t(), inputs)
            if not is_first:
                torch.mm(outputs, weight)

    return multiply


def _in_turns(ways: dict[str, Way], turns: int) -> dict[str, list[float]]:
    """Return the seconds per call of each way in each turn, without the first turn, which only warms up."""
    seconds_by_way: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(_CALLS):
                way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds_by_way[name].append((time.perf_counter() - start) / _CALLS)
    return {name: seconds[1:] for name, seconds in seconds_by_way.items()}


if __name__ == "__main__":
    main()
