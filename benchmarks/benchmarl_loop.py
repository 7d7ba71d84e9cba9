"""Train BenchMARL's MAPPO on a task of VMAS with a configuration of mappo.

    .venv-benchmarl/bin/python -m benchmarks.benchmarl_loop SETTINGS DIRECTORY

The program runs in BenchMARL's own virtual environment, so it imports nothing of mappo. SETTINGS is a
configuration as JSON.
"""

import json
import sys
import time
from pathlib import Path

import torch
from benchmarl.algorithms import MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Callback, Experiment, ExperimentConfig
from benchmarl.models.mlp import MlpConfig

from benchmarks.progress import Progress


class _Reporting(Callback):  # type: ignore[misc]
    """A callback that reports the times of each iteration and the policies of all groups after it."""

    def __init__(self, progress: Progress):
        super().__init__()
        self._progress, self._iteration_start = progress, time.perf_counter()

    def on_batch_collected(self, batch: object) -> None:  # noqa: ARG002
        self._collect_end = time.perf_counter()

    def on_train_end(self, training_td: object, group: str) -> None:  # noqa: ARG002
        policies = self.experiment.group_policies
        if group != list(policies)[-1]:
            return
        self._progress.report_iteration(
            self.experiment.total_frames,
            self._collect_end - self._iteration_start,
            time.perf_counter() - self._collect_end,
            {
                f"{name}.{parameter}": value
                for name, policy in policies.items()
                for parameter, value in policy.named_parameters()
            },
        )
        self._iteration_start = time.perf_counter()


def main() -> None:
    """Train and report every iteration."""
    settings, directory = json.loads(sys.argv[1]), Path(sys.argv[2])
    learner, collection = settings["learner"], settings["collection"]
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    progress = Progress(directory)
    algorithm, config = MappoConfig.get_from_yaml(), ExperimentConfig.get_from_yaml()
    algorithm.clip_epsilon, algorithm.lmbda = learner["clip_epsilon"], learner["gae_lambda"]
    config.gamma, config.lr = learner["discount"], learner["learning_rate"]
    config.on_policy_collected_frames_per_batch = collection["num_envs"] * collection["rollout_frames"]
    config.on_policy_n_envs_per_worker = collection["num_envs"]
    config.on_policy_n_minibatch_iters = learner["epochs"]
    config.on_policy_minibatch_size = learner["minibatch_frames"]
    config.max_n_frames = collection["total_frames"]
    config.sampling_device = config.train_device = config.buffer_device = settings["device"]
    config.loggers, config.create_json, config.evaluation, config.render = [], False, False, False
    config.save_folder = str(directory)
    environment = settings["environment"]
    task = VmasTask[environment["scenario"].upper()].get_from_yaml()
    task.config |= {**environment["scenario_kwargs"], "max_steps": environment["max_episode_frames"]}
    Experiment(
        task=task,
        algorithm_config=algorithm,
        model_config=MlpConfig.get_from_yaml(),
        critic_model_config=MlpConfig.get_from_yaml(),
        seed=settings["seed"],
        config=config,
        callbacks=[_Reporting(progress)],
    ).run()


if __name__ == "__main__":
    main()
