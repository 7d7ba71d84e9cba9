"""The verdicts on constraints: whether the episodes of a policy show that it keeps its limits."""

from dataclasses import dataclass

from mappo.environment.reductions import Reduction
from mappo.evaluation import statistics
from mappo.evaluation.constraints import Constraint
from mappo.evaluation.measurements import Measurement, means_of_groups


@dataclass(frozen=True)
class Verdict:
    """The verdict on a constraint.

    mean: the mean over all episodes. bound: its one-sided confidence bound, on the side of the limit. Both are
    None if an episode has no number. is_kept: whether the bound keeps the limit. method: the computation of the
    bound, and what its confidence depends on; or the reason why there is no bound.
    """

    constraint: Constraint
    reduction: Reduction | None
    confidence: float
    mean: float | None
    bound: float | None
    is_kept: bool
    method: str

    def __str__(self) -> str:
        """Return the numbers and the verdict, as in `0.02, with 95% confidence below 0.04; at most 0.1: kept`."""
        verdict = f"{self.constraint}: {'kept' if self.is_kept else 'NOT KEPT'} ({self.method})"
        if self.bound is None:
            return verdict
        side = "below" if self.constraint.sign > 0 else "above"
        return f"{self.mean:.4g}, with {100 * self.confidence:g}% confidence {side} {self.bound:.4g}; {verdict}"


def judge_constraint(
    constraint: Constraint, measurement: Measurement | None, confidence: float, episodes_per_unit: int
) -> Verdict:
    """Return whether a policy keeps a constraint with this confidence.

    measurement: None if no episode has one. episodes_per_unit: the number of episodes in a row that depend on each
    other. Their mean is one independent unit.
    """
    if measurement is None or (mean := measurement.mean_of_all) is None:
        # Otherwise, a policy could pass by avoiding to be measured.
        reduction = measurement.reduction if measurement else None
        return Verdict(constraint, reduction, confidence, None, None, False, f"{measurement or 'not measured'}")
    units = [constraint.sign * value for value in means_of_groups(measurement.episode_values, episodes_per_unit)]
    name = "seeds" if episodes_per_unit > 1 else "episodes"
    if statistics.is_rare(units):
        largest = max(constraint.largest_event, max(units) - min(units))
        bound = statistics.rare_upper_bound(units, largest, confidence)
        method = (
            f"bound for rare events over {len(units)} {name}; it holds if the events of one {name[:-1]} change it "
            f"by at most {largest:.4g}"
        )
    else:
        bound = statistics.upper_bound(units, confidence)
        method = f"Student's t over {len(units)} {name}; it holds if these are roughly symmetric"
    bound *= constraint.sign
    return Verdict(
        constraint, measurement.reduction, confidence, mean, bound, constraint.excess(bound) <= 0, method
    )
