"""The stage that writes the page of runs, or of a study."""

from collections.abc import Sequence
from pathlib import Path

from mappo.evaluation.comparison import ComparisonReport
from mappo.monitoring.tracking import tracked_run
from mappo.promotion.promotion import parse_decision
from mappo.reporting import run_page, run_record, study_page
from mappo.reporting.study_result import verdict
from mappo.reporting.tables import STUDY_NAMES
from mappo.reporting.terminal import say
from mappo.runs.owned_file import write_whole
from mappo.stages.compare import compare_reports
from mappo.stages.readable_errors import readable_errors
from mappo.stages.runtime import StageResult, estimate_metrics, metadata_of
from mappo.tuning.database import open_database
from mappo.tuning.search_space import applied
from mappo.tuning.study import Study

PAGE = "report.html"  # the file of a page of runs; in the directory of a run, its own page


def report(locations: Sequence[str], output: Path) -> None:
    """Write one HTML page of one run, or of several side by side.

    Raises:
        StageFailed: a run cannot be read.
    """
    with readable_errors("report"):
        write_page(output, run_record.of_runs(locations))
        say("report", f"page: {page_address(output)}")


def page_of_run(location: str) -> Path | None:
    """Return the file of a run's own page; None if the run is in a bucket."""
    return None if "://" in location else Path(location, PAGE)


def page_address(path: Path) -> str:
    """Return the address by which a browser opens a local file."""
    return path.absolute().as_uri()


def write_page(path: Path, records: Sequence[run_record.RunRecord]) -> None:
    """Write the HTML page of runs."""
    write_whole(path, run_page.build(records))


def report_study(
    name: str, trial: int, evaluations: Sequence[Path], decision: Path, comparison: Path, page: Path
) -> StageResult:
    """Compare the chosen trial's configuration with the default, and write one page of the study.

    `evaluations` are reports of the default from each fresh seed, then of the best. `decision` is a file that the
    promotion wrote; `comparison` and `page` are files to write.

    Raises:
        StageFailed: a file or the database cannot be read.
    """
    with readable_errors("report"), open_database() as database:
        study = Study.load(database, name)
        chosen = study.trials()[trial]
        best = applied(study.plan.config, chosen.values)
        reports = list(evaluations)
        if best == study.plan.config:
            reports = reports[: len(reports) // 2]  # the best is the default: both halves are the same trainings
        compared = compare_reports(reports, comparison, STUDY_NAMES)
        say("report", verdict(compared)[1])
        decided = parse_decision(str(decision), decision.read_bytes())
        directory = page.parent if page.parent.absolute() == Path(study.store).absolute() else None
        write_whole(page, study_page.build(study, chosen, compared, decided, directory))
        gain = gain_metrics(compared)
        with tracked_run(best, name, f"{study.store}/{name}", tags={"mappo.study": name}) as tracked:
            tracked.measured(0, {f"comparison/{key}": value for key, value in gain.items()})
            tracked.attach(page)
        return StageResult(metadata_of(best), gain)


def gain_metrics(comparison: ComparisonReport) -> dict[str, float]:
    """Return the mean returns of the default and of the best, and the gain, which is 0 where they are the same."""
    default, best = comparison.configurations[0], comparison.configurations[-1]
    gain = {"gain": 0.0} if best.gain is None else estimate_metrics("gain", best.gain)
    return {"default_return_mean": default.mean.value, "best_return_mean": best.mean.value, **gain}
