"""The result of a study: its best compared with the default, once both were trained from fresh seeds."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter

from mappo.config import differences
from mappo.reporting.tables import STUDY_NAMES, comparison_table
from mappo.strict_json import parse_report
from mappo.tuning.database_url import RUNS
from mappo.tuning.search_space import applied

if TYPE_CHECKING:
    from mappo.evaluation.comparison import ComparisonReport  # imports torch
    from mappo.tuning.study import Study
    from mappo.tuning.trial import TrialRecord

COMPARISON, PAGE = "comparison.json", "study.html"  # files of a study


def study_directory(store: str) -> Path:
    """Return the directory of a study's files: that of its runs, or one below runs/ if these are in a bucket."""
    return RUNS / PurePosixPath(store).name if "://" in store else Path(store)


def verdict(comparison: "ComparisonReport") -> tuple[Literal["", "good", "look", "problem"], str]:
    """Return one sentence, and how good it is: is the best better than the default, trained from fresh seeds?"""
    gain = comparison.configurations[-1].gain
    if gain is None:
        return "", "The default was best: there is nothing to change."
    if gain.low is not None and gain.low > 0:
        return "good", f"The best is better than the default: {gain} more return an episode."
    if gain.high is not None and gain.high < 0:
        return "problem", f"The best is worse than the default: {gain} more return an episode."
    return (
        "look",
        f"The data show no difference from the default: {gain} more return an episode, an interval around zero.",
    )


def result_lines(study: "Study", best: "TrialRecord") -> Sequence[str]:
    """Return the comparison, the verdict and the page of a study, or how to get them.

    Raises:
        ConfigError: the file of the comparison was damaged.
    """
    directory = study_directory(study.store)
    try:
        content = (directory / COMPARISON).read_bytes()
    except FileNotFoundError:
        return [f"the best and the default were not trained again yet: mappo study resume {study.name}"]
    from mappo.evaluation.comparison import ComparisonReport

    report = parse_report(
        TypeAdapter(ComparisonReport), str(directory / COMPARISON), content, "a comparison report"
    )
    config = study.plan.config
    if report.configurations[-1].differs != differences(config, applied(config, best.values)):
        hint = f"mappo study resume {study.name}"
        return [
            f"the comparison below is that of an earlier best; {hint} compares this one",
            *_lines(report, directory),
        ]
    return _lines(report, directory)


def _lines(report: "ComparisonReport", directory: Path) -> list[str]:
    page = directory / PAGE
    shown = [f"page: {page.absolute().as_uri()}"] if page.exists() else []
    return [*comparison_table(report, STUDY_NAMES), verdict(report)[1], *shown]
