"""Named, complete configurations. A recipe is a function; its docstring says what it trains."""

from collections.abc import Callable

from mappo.config import CollectionConfig, ConfigError, EnvironmentConfig, ExperimentConfig


def navigation() -> ExperimentConfig:
    """Three agents with lidar, each to its own goal without collisions."""
    return ExperimentConfig(
        environment=EnvironmentConfig(
            scenario="navigation",
            scenario_kwargs={"n_agents": 3, "shared_rew": False, "lidar_range": 0.35},
        ),
    )


def balance() -> ExperimentConfig:
    """Four agents carry a ball on a beam to a goal and keep it from falling."""
    return ExperimentConfig(
        environment=EnvironmentConfig(scenario="balance", scenario_kwargs={"n_agents": 4}),
        collection=CollectionConfig(total_frames=300_000),
    )


RECIPES: dict[str, Callable[[], ExperimentConfig]] = {
    recipe.__name__.replace("_", "-"): recipe for recipe in (navigation, balance)
}


def recipe(name: str) -> ExperimentConfig:
    """The configuration of a recipe.

    Raises:
        ConfigError: no recipe has this name; the message lists those there are.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe = {name!r}: unknown; recipes: {', '.join(RECIPES)}")
    return RECIPES[name]()
