"""The numbers that a scenario measures in `info()`, and the reduction of each over an episode.

A scenario declares its own reductions in the class attribute `MEASUREMENTS`. Without it, they are guessed from
names, by a table for the scenarios of VMAS and by rules for all others.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from mappo.errors import ConfigError

Reduction = Literal["last", "sum", "mean", "maximum"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
MAX_MEASUREMENTS = 20  # of one scenario, since names become labels of metrics
MAX_NAME_LENGTH = 64
MeasurementName = Annotated[
    str, Field(min_length=1, max_length=MAX_NAME_LENGTH, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")
]

_CHOICES = f"one of {', '.join(REDUCTIONS)}"
_OF_VMAS: dict[str, Reduction] = {  # names in scenarios of VMAS to which the rules below do not apply
    "final_rew": "last",  # navigation, give_way and multi_give_way: whether all agents are at their goals
    "dist_ball_to_goal": "last",  # football
    "passed": "maximum",  # joint_passage and joint_passage_size: 1 in the frame in which all have passed
    "max_speed": "maximum",  # het_mass
    "targets_covered": "sum",  # discovery: the targets that are covered in this frame
    "agent_sample": "sum",  # sampling
    "energy_expenditure": "sum",  # het_mass and vel_control: a penalty
}


def declared_reductions(scenario: Any) -> dict[str, Reduction] | None:
    """Return the reductions that a scenario declares, by measurement; None if it declares none.

    Raises:
        ConfigError: the declaration is not a dictionary from names to reductions.
    """
    declared = getattr(scenario, "MEASUREMENTS", None)
    if declared is None:
        return None
    where = f"environment.scenario: {type(scenario).__name__}.MEASUREMENTS"
    if not isinstance(declared, Mapping):
        raise ConfigError(f"{where} is not a dictionary; give one from names in info() to {_CHOICES}")
    if len(declared) > MAX_MEASUREMENTS:
        raise ConfigError(f"{where} has {len(declared)} names; at most {MAX_MEASUREMENTS} are measured")
    for key, reduction in declared.items():
        if not is_measurement_name(key):
            raise ConfigError(f"{where}: {key!r} is not a name of at most {MAX_NAME_LENGTH} printable characters")
        if reduction not in REDUCTIONS:
            raise ConfigError(f"{where}[{key!r}] = {reduction!r}: give {_CHOICES}")
    return dict(declared)


def guess_reductions(reductions: dict[str, Reduction], names: Iterable[str]) -> None:
    """Add the reductions of names that no scenario declares, until there are `MAX_MEASUREMENTS`.

    Rewards and collisions are added up, and other numbers are averaged.
    """
    for name in names:
        if name not in reductions and len(reductions) < MAX_MEASUREMENTS:
            is_added_up = name.endswith(("_rew", "_reward")) or "collision" in name
            reductions[name] = _OF_VMAS.get(name, "sum" if is_added_up else "mean")


def is_measurement_name(name: object) -> bool:
    """Return whether a key of `info()` can name a measurement."""
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable()
