"""The recipes: named, complete configurations.

A recipe is a function. `mappo recipes` prints its docstring and its measured result, which
`python -m benchmarks.recipes --save` writes into `mappo/reporting/recipe_results.json`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from mappo.config import (
    CollectionConfig,
    EnvironmentConfig,
    ExperimentConfig,
    LearnerConfig,
    NetworksConfig,
    SelectionConfig,
    fields_of,
)
from mappo.errors import ConfigError, hint_for

_NAVIGATION = EnvironmentConfig(
    scenario="navigation", scenario_kwargs={"n_agents": 3, "shared_rew": False, "lidar_range": 0.35}
)
_SWARM = EnvironmentConfig(scenario="swarm", scenario_kwargs={"n_agents": 4, "n_targets": 3})

# The learners of `_in_large_batches`; the second one was the best of two studies (docs/recipes.md).
_LEARNER = LearnerConfig(discount=0.98, gae_lambda=0.95, epochs=5, minibatch_frames=2_000, learning_rate=2e-3)
_EXPLORING = replace(_LEARNER, discount=0.97, epochs=8, learning_rate=2.7e-3, entropy_coefficient=0.01)


def navigation() -> ExperimentConfig:
    """Train three agents with lidar to reach their own goals without collisions."""
    return ExperimentConfig(environment=_NAVIGATION)


def navigation_quick() -> ExperimentConfig:
    """Train navigation to a return of 0.9 in the least time: smaller networks and batches, shorter horizon."""
    return ExperimentConfig(
        environment=_NAVIGATION,
        networks=NetworksConfig(hidden_sizes=(128, 128)),
        learner=LearnerConfig(discount=0.95, gae_lambda=0.8, minibatch_frames=1_000),
        collection=CollectionConfig(num_envs=120, rollout_frames=50),
    )


def navigation_ippo() -> ExperimentConfig:
    """Train navigation by IPPO, the baseline of MAPPO: each agent's critic sees only its own observation."""
    return ExperimentConfig(environment=_NAVIGATION, networks=NetworksConfig(critic="own"))


def balance() -> ExperimentConfig:
    """Train four agents to carry a ball on a beam to a goal without dropping it."""
    return ExperimentConfig(
        environment=EnvironmentConfig(scenario="balance", scenario_kwargs={"n_agents": 4}),
        collection=CollectionConfig(total_frames=300_000),
    )


def swarm() -> ExperimentConfig:
    """Train four agents to cover three moving targets and avoid collisions."""
    return ExperimentConfig(
        environment=_SWARM,
        networks=NetworksConfig(normalise_values=True),
        learner=LearnerConfig(discount=0.95, minibatch_frames=300),
        collection=CollectionConfig(rollout_frames=50, total_frames=600_000),
        selection=SelectionConfig(interval_iterations=20),
    )


def sampling() -> ExperimentConfig:
    """Train three agents with lidar to visit the likeliest places of a density before the others do."""
    return _in_large_batches(
        EnvironmentConfig(scenario="sampling", scenario_kwargs={"n_agents": 3, "shared_rew": False}),
        total_frames=300_000,
        learner=_EXPLORING,
    )


def wheel() -> ExperimentConfig:
    """Train four agents to turn a heavy line at a desired angular velocity."""
    return _in_large_batches(
        EnvironmentConfig(scenario="wheel", scenario_kwargs={"n_agents": 4, "line_length": 1}),
        total_frames=600_000,
        learner=replace(_LEARNER, discount=0.95),
    )


def dispersion() -> ExperimentConfig:
    """Train four agents that start at one point to reach four small targets, by policies of their own."""
    return _in_large_batches(
        EnvironmentConfig(
            scenario="dispersion", scenario_kwargs={"n_agents": 4, "food_radius": 0.02}, actions="multi-discrete"
        ),
        total_frames=3_000_000,
        rollout_frames=100,
        learner=replace(_LEARNER, discount=0.97, epochs=4, learning_rate=3e-3, entropy_coefficient=0.01),
        share_policy=False,
    )


def give_way() -> ExperimentConfig:
    """Train two agents to swap places in a corridor where one must make way in a bay."""
    return _in_large_batches(
        EnvironmentConfig(
            scenario="give_way", scenario_kwargs={"done_on_completion": True}, actions="multi-discrete"
        ),
        total_frames=300_000,
        learner=_LEARNER,
    )


def reverse_transport() -> ExperimentConfig:
    """Train four agents inside a heavy package to push it to its goal."""
    return _in_large_batches(
        EnvironmentConfig(
            scenario="reverse_transport",
            scenario_kwargs={"n_agents": 4},
            max_episode_frames=200,
            actions="multi-discrete",
        ),
        total_frames=300_000,
        learner=_LEARNER,
    )


def discovery() -> ExperimentConfig:
    """Train five agents with lidar to find seven targets, each of which takes two agents at a time."""
    return _in_large_batches(
        EnvironmentConfig(
            scenario="discovery",
            scenario_kwargs={"n_agents": 5, "targets_respawn": False},
            actions="multi-discrete",
        ),
        total_frames=500_000,
        learner=replace(_LEARNER, epochs=7, learning_rate=9.1e-4, entropy_coefficient=0.002),
    )


def simple_spread() -> ExperimentConfig:
    """Train three agents to cover three landmarks together without collisions."""
    return _in_large_batches(
        EnvironmentConfig(scenario="simple_spread", scenario_kwargs={"n_agents": 3}, actions="multi-discrete"),
        total_frames=600_000,
        learner=_EXPLORING,
    )


def recall() -> ExperimentConfig:
    """Train two agents with a memory to go to the side that a cue in the first frame of an episode named."""
    return ExperimentConfig(
        environment=EnvironmentConfig(scenario="recall", scenario_kwargs={"n_agents": 2}, max_episode_frames=15),
        networks=NetworksConfig(hidden_sizes=(64, 64), memory="gru"),
        learner=LearnerConfig(gae_lambda=0.95),
        collection=CollectionConfig(total_frames=60_000),
    )


def seed_document() -> ExperimentConfig:
    """Train the swarm for 100,000 frames in batches of 1,000, with minibatches of 64 and 10 epochs."""
    return ExperimentConfig(
        environment=_SWARM,
        networks=NetworksConfig(normalise_values=True),
        learner=LearnerConfig(discount=0.95, epochs=10, minibatch_frames=64, learning_rate=1e-3),
        collection=CollectionConfig(num_envs=50, rollout_frames=20, total_frames=100_000),
        selection=SelectionConfig(interval_iterations=10),
    )


def benchmarl_base() -> ExperimentConfig:
    """Train navigation with the hyperparameters of BenchMARL's base configuration."""
    return ExperimentConfig(
        environment=_NAVIGATION,
        learner=_benchmarl_learner(discount=0.99, minibatch_frames=400),
        collection=CollectionConfig(num_envs=10, rollout_frames=600, total_frames=3_000_000),
        selection=SelectionConfig(interval_iterations=20),
    )


def benchmarl_fine_tuned() -> ExperimentConfig:
    """Train navigation with the hyperparameters that BenchMARL tuned for VMAS; use a GPU."""
    return ExperimentConfig(
        environment=_NAVIGATION,
        learner=_benchmarl_learner(discount=0.9, minibatch_frames=4_096),
        collection=CollectionConfig(num_envs=600, rollout_frames=100, total_frames=10_000_000),
        selection=SelectionConfig(interval_iterations=2),
    )


def gpu() -> ExperimentConfig:
    """Train navigation in batches that keep a GPU busy: 4,096 environments, minibatches of 16,384 frames."""
    return ExperimentConfig(
        environment=_NAVIGATION,
        learner=LearnerConfig(minibatch_frames=16_384),
        collection=CollectionConfig(num_envs=4_096, rollout_frames=50, total_frames=3_000_000),
    )


def _in_large_batches(
    environment: EnvironmentConfig,
    total_frames: int,
    learner: LearnerConfig,
    rollout_frames: int = 50,
    share_policy: bool = True,
) -> ExperimentConfig:
    """Return a configuration with small networks and 200 environments, which takes little time for a frame."""
    return ExperimentConfig(
        environment=environment,
        networks=NetworksConfig(hidden_sizes=(128, 128), share_policy=share_policy, normalise_values=True),
        learner=learner,
        collection=CollectionConfig(num_envs=200, rollout_frames=rollout_frames, total_frames=total_frames),
        selection=SelectionConfig(interval_iterations=10),
    )


def _benchmarl_learner(discount: float, minibatch_frames: int) -> LearnerConfig:
    """Return the settings that both of BenchMARL's configurations share."""
    return LearnerConfig(
        discount=discount,
        epochs=45,
        minibatch_frames=minibatch_frames,
        learning_rate=5e-5,
        learning_rate_schedule="constant",
        advantage_normalisation="none",
    )


DEFAULT_RECIPE = "navigation"
RECIPES: dict[str, Callable[[], ExperimentConfig]] = {
    recipe.__name__.replace("_", "-"): recipe
    for recipe in (
        navigation,
        navigation_quick,
        navigation_ippo,
        balance,
        swarm,
        sampling,
        wheel,
        dispersion,
        give_way,
        reverse_transport,
        discovery,
        simple_spread,
        recall,
        seed_document,
        benchmarl_base,
        benchmarl_fine_tuned,
        gpu,
    )
}


def recipe(name: str) -> ExperimentConfig:
    """Return the configuration of the recipe with this name.

    Raises:
        ConfigError: no recipe has this name; the message names the closest, or all.
    """
    if name not in RECIPES:
        hint = hint_for(name, RECIPES, f"give one of {', '.join(RECIPES)}")
        raise ConfigError(f"recipe = {name!r}: unknown; {hint}")
    return RECIPES[name]()


def nearest_recipe(config: ExperimentConfig) -> tuple[str, dict[str, Any]]:
    """Return the recipe from which the fewest fields differ, and these fields with the configuration's values."""
    values = fields_of(config)
    changes = {
        name: {field: value for field, value in values.items() if value != fields[field]}
        for name, fields in fields_of_recipes().items()
    }
    nearest = min(changes, key=lambda name: len(changes[name]))  # of equals the first
    return nearest, changes[nearest]


@cache
def fields_of_recipes() -> dict[str, dict[str, Any]]:
    """Return the fields of each recipe, by the names of the recipe and of the field."""
    return {name: fields_of(make()) for name, make in RECIPES.items()}
