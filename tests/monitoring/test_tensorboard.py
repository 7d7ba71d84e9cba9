import csv
import io
import json
import math
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mappo.__main__ import main
from mappo.config import fields_of, from_dict
from mappo.errors import ConfigError
from mappo.monitoring.tensorboard import EventFiles
from mappo.recipes import recipe
from mappo.runs.run import load_checkpoint
from mappo.training.history import TrainingStarted
from tests import conftest
from tests.cli.test_main import TINY
from tests.support.runs import train_here
from tests.support.services import file_system_of


def scalars(directory) -> dict[str, list[tuple[int, float]]]:
    """Return the scalars of event files, as TensorBoard's own code reads them."""
    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def hyperparameters(directory) -> dict[str, object]:
    """Return the hyperparameters of a run, as TensorBoard's own plugin parses them."""
    events = EventAccumulator(str(directory))
    events.Reload()
    content = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    values = content.session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


def test_tensorboard_has_every_number_of_the_history_once_also_after_a_restart(tmp_path, monkeypatch):
    """Let two runs write frames 121 to 240, as after a crash: TensorBoard shows them once, from the second."""
    monkeypatch.chdir(tmp_path)
    events = ["--tensorboard", str(tmp_path / "events")]
    assert main(["train", *TINY, "--run", "first", *events]) == 0
    longer = ["--extend", "runs/first", "--collection.total-frames", "240", *events]
    for run in ("lost", "second"):
        assert main(["train", *longer, "--run", run]) == 0
    rows = [
        row
        for run in ("first", "second")
        for row in csv.DictReader(io.StringIO(load_checkpoint(f"runs/{run}", "last").history))
    ]
    written = scalars(tmp_path / "events")
    for column, tag in (
        ("loss_critic", "loss/loss_critic"),
        ("kl", "learning/kl"),
        ("episode_return_mean", "return/episode_return_mean"),
        ("measured_pos_rew", "measurement/measured_pos_rew"),
    ):
        expected = [(int(row["frames"]), float(row[column])) for row in rows if row[column]]
        assert [step for step, _ in written[tag]] == [step for step, _ in expected]
        assert all(math.isclose(a, b, rel_tol=1e-5) for (_, a), (_, b) in zip(written[tag], expected, strict=True))
    values = hyperparameters(tmp_path / "events")
    assert (values["collection.total_frames"], values["learner.epochs"], values["device"]) == (
        120,
        1,
        "auto",
    )  # of the first run here
    assert json.loads(values["networks.hidden_sizes"]) == [16]
    assert values.keys() == fields_of(recipe("navigation")).keys()


def test_numbers_of_a_full_disk_are_written_as_soon_as_it_has_space(tmp_path, caplog):
    reports = []
    train_here(from_dict(conftest.TINY), tmp_path / "run", reports.append)
    with file_system_of(1024, tmp_path / "disk") as disk:
        files = EventFiles(disk / "events", from_dict(conftest.TINY))
        files.begin(TrainingStarted(reports[0].progress, 1, False))
        files.write(reports[0])
        filling = disk / "filling"
        with pytest.raises(OSError, match="No space left"), filling.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        for report in reports[1:3] * 40:  # more than fits into the last page
            files.write(report)
        assert caplog.text.count("No space left on device; training continues") == 1
        filling.unlink()
        files.write(reports[-1])
        steps = [step for step, _ in scalars(disk / "events")["learning/kl"]]
    assert set(steps) == {int(report.row()["frames"]) for report in reports}


def test_a_missing_package_raises_an_error_with_the_command_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'mappo\[tensorboard\]'"):
        EventFiles(tmp_path, from_dict(conftest.TINY))
