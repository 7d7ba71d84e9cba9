import copy
import json
import random
import re
from pathlib import Path

import pytest
import yaml
from kfp import compiler, dsl

from mappo.config import to_json
from mappo.errors import ConfigError
from mappo.recipes import recipe
from pipelines.compiling import NAMES, compile_pipeline
from pipelines.guards import check_specification
from pipelines.parameter_guards import check_parameters, parse_parameter
from pipelines.site import check_site
from pipelines.specification import parameters_of
from tests.support.kubeflow_rules import Refused
from tests.support.kubeflow_rules import check_parameters as server_checks_parameters

GOLDEN = {name: Path(f"tests/golden/{name}.yaml").read_text() for name in NAMES}


def documents(name: str = "training") -> list[dict]:
    return list(yaml.safe_load_all(GOLDEN[name]))


def specification(name: str = "training") -> dict:
    return documents(name)[0]


def refused(specification: dict, text: str = "") -> str:
    with pytest.raises(ConfigError) as error:
        check_specification(text or yaml.dump(specification), [specification])
    return str(error.value)


def compiled(pipeline, tmp_path) -> dict:
    path = tmp_path / "pipeline.yaml"
    compiler.Compiler().compile(pipeline, str(path))
    return next(yaml.safe_load_all(path.read_text()))


@dsl.component(base_image="python:3.12", install_kfp_package=False)
def give() -> int:
    return 7


@dsl.component(base_image="python:3.12", install_kfp_package=False)
def take(number: int, item: str):
    print(number, item)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_pipelines_have_no_known_defect(name):
    check_specification(GOLDEN[name], list(yaml.safe_load_all(GOLDEN[name])))


def test_output_of_an_outer_task_inside_a_loop_is_refused(tmp_path):
    """In a local run, `take` would get the loop's item as `number`; see test_pipelines."""

    @dsl.pipeline(name="trap")
    def trap():
        number = give().set_caching_options(False)
        with dsl.ParallelFor(["a", "b"]) as item:
            take(number=number.output, item=item).set_caching_options(False)

    assert "local runs replace by the loop's item" in refused(compiled(trap, tmp_path))


def test_resources_that_do_not_reach_into_a_loop_are_refused(tmp_path):
    """Kubeflow's compiler omits them, and the driver fails: parent DAG does not have input parameter."""

    @dsl.pipeline(name="trap")
    def trap(cpu: str = "1"):
        with dsl.ParallelFor(["a", "b"]) as item:
            take(number=1, item=item).set_caching_options(False).set_cpu_limit(cpu)

    assert "takes pipelinechannel--cpu from pipelinechannel--cpu, which comp-for-loop-" in refused(
        compiled(trap, tmp_path)
    )


def test_task_after_a_loop_that_may_fail_is_refused(tmp_path):
    """Kubeflow runs such a task as a hook of the task before it, and gives no hook to a loop."""

    @dsl.pipeline(name="trap")
    def trap():
        with dsl.ParallelFor(["a", "b"]) as item:
            taken = take(number=1, item=item).set_caching_options(False)
        give().set_caching_options(False).after(taken).ignore_upstream_failure()

    assert re.search(r"task give: shall follow for-loop-\d+ even if that fails", refused(compiled(trap, tmp_path)))


def test_placeholder_in_the_environment_is_refused(tmp_path):
    @dsl.pipeline(name="trap")
    def trap(name: str = "a"):
        take(number=1, item="b").set_caching_options(False).set_env_variable("WHO", f"hello {name}")

    assert "environment WHO" in refused(compiled(trap, tmp_path))


def test_cached_task_is_refused(tmp_path):
    @dsl.pipeline(name="trap")
    def trap():
        give()

    assert "task give: is cached" in refused(compiled(trap, tmp_path))


def test_resources_from_a_parameter_that_is_not_text_are_refused(tmp_path):
    @dsl.pipeline(name="trap")
    def trap(count: int = 1):
        give().set_caching_options(False).set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(count)

    assert "resource from count, which is a whole number" in refused(compiled(trap, tmp_path))


def _image(specification: dict) -> None:
    specification["deploymentSpec"]["executors"]["exec-train"]["container"]["image"] = "registry/mappo"


def _default_image(specification: dict) -> None:
    specification["root"]["inputDefinitions"]["parameters"]["image"]["defaultValue"] = "mappo"


def _secret_in_environment(specification: dict) -> None:
    container = specification["deploymentSpec"]["executors"]["exec-train"]["container"]
    container["env"] = [{"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"}]


def _secret_in_default(specification: dict) -> None:
    specification["root"]["inputDefinitions"]["parameters"]["store"]["defaultValue"] = "http://me:pw@host/runs"


def _key_in_constant(specification: dict) -> None:
    task = specification["root"]["dag"]["tasks"]["train"]
    task["inputs"]["parameters"]["store"] = {"runtimeValue": {"constant": "AKIAABCDEFGHIJKLMNOP"}}


def _unknown_placeholder_in_default(specification: dict) -> None:
    specification["root"]["inputDefinitions"]["parameters"]["run"]["defaultValue"] = "n-[[CurrentTime]]"


def _large_default(specification: dict) -> None:
    specification["root"]["inputDefinitions"]["parameters"]["config"]["defaultValue"] = "x" * 10_001


@pytest.mark.parametrize(
    ("defect", "reason"),
    [
        (_image, "exec-train: image 'registry/mappo'"),
        (_default_image, "parameter image: image 'mappo'"),
        (_secret_in_environment, "environment AWS_SECRET_ACCESS_KEY is given in the specification"),
        (_secret_in_default, "parameters.store.defaultValue: looks like a credential"),
        (_key_in_constant, "looks like a credential"),
        (_large_default, "defaults of parameters: 1"),
        (_unknown_placeholder_in_default, "parameter run: 'n-[[CurrentTime]]': nothing replaces [[CurrentTime]]"),
    ],
)
def test_defect_is_refused_with_its_location(defect, reason):
    broken = copy.deepcopy(specification())
    defect(broken)
    assert reason in refused(broken)


def test_specification_too_large_for_kubernetes_is_refused():
    assert "bytes" in refused(specification(), GOLDEN["training"] + "#" * 1_000_000)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"train_gpus": "1"}, "parameter train_gpus: unknown; did you mean train_"),
        ({"zzz": "1"}, "parameter zzz: unknown; there is: config,"),
        ({"train_gpu_count": 1}, "parameter train_gpu_count = 1: must be text"),
        ({"train_gpu_count": "one"}, "gpu_count"),
        ({"train_tolerations": {}}, "must be a JSON list"),
        ({"train_tolerations": [{"keys": "x"}]}, "stages.train.tolerations.0.keys"),
        ({"train_node_selector": []}, "must be a JSON object"),
        ({"train_cpu": "many"}, "must be a number of cores"),
        ({"validate_memory": "8GB"}, "must be an amount of memory"),
        ({"image": "mappo"}, "must be NAME:TAG"),
        ({"s3_secret": ""}, "must be a Kubernetes name"),
        ({"config": '{"learner": {"epochs": 0}}'}, "learner.epochs = 0"),
        ({"config": "{"}, "not JSON"),
        ({"config": None}, "parameter config = null: must be text"),
        ({"store": "x" * 10_000}, "the server takes 10000"),
    ],
)
def test_wrong_parameter_is_refused_with_its_name(parameters, reason):
    with pytest.raises(ConfigError) as error:
        check_parameters(documents(), parameters)
    assert reason in str(error.value)


STORE = {"store": "s3://bucket/runs"}
TIME = "[[ScheduledTime]]"


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({**STORE, "run": "Nightly_1"}, "run 'Nightly_1': a name has 1 to 63 lower-case letters"),
        ({**STORE, "run": "n" * 64}, "a name has 1 to 63"),
        ({**STORE, "run": "n" * 50 + TIME}, "a name has 1 to 63"),
        ({"run": "nightly"}, "run = 'nightly': a name needs a store"),
        ({"run": f"nightly-{TIME}"}, f"run = 'nightly-{TIME}': a name needs a store"),
        ({"store": "s3://bucket/über", "run": "a"}, "parameter store: 's3://bucket/über': not a location"),
        ({"store": "gs://bucket/runs", "run": "a"}, "parameter store: 'gs://bucket/runs': not a location"),
        ({"store": "s3://b/../c", "run": "a"}, "not a location"),
        ({"store": "runs", "run": "a"}, "parameter store = 'runs': a directory of a pod is lost"),
        ({"store": "/data/runs", "run": "a"}, "a directory of a pod is lost"),
        *(
            ({**STORE, "run": f"n-{wrong}"}, f"nothing replaces {wrong}; write {TIME}")
            for wrong in (
                "[[CurrentTime]]",
                "[[Index]]",
                "[[RunUUID]]",
                "[[ScheduledTime.2006-01-02T15:04]]",
                "[[CurrentTime.20060102]]",
            )
        ),
        ({"image": "ghcr.io/you/mappo:[[CurrentTime]]"}, "image"),
        ({"s3_secret": TIME}, "s3_secret"),
        (
            {"config": json.dumps({"environment": {"scenario_kwargs": {"a": [TIME]}}})},
            "replaced in run, edition, store only",
        ),
        (
            {"train_node_selector": {"a": "b"}, "config": '{"device": "cpu"}', "train_gpu_count": "1"},
            "set device to auto or",
        ),
        ({"config": '{"device": "cpu"}', "evaluate_gpu_count": "1"}, "evaluate_gpu_count to 0"),
        ({"train_gpu_count": "٣"}, "gpu_count"),
        ({"train_gpu_count": "9" * 5000}, "gpu_count"),
    ],
)
def test_combination_of_parameters_that_a_stage_would_refuse_is_refused(parameters, reason):
    with pytest.raises(ConfigError) as error:
        check_parameters(documents(), {"train_gpu_count": "0", "evaluate_gpu_count": "0", **parameters})
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {**STORE, "run": f"nightly-{TIME}"},
        {"store": f"s3://bucket/{TIME}", "run": "a"},
        {"store": "minio://bucket/runs", "run": "0"},
        {"config": '{"environment": {"scenario": "m:S", "scenario_kwargs": {"a": [[true, null]]}}}'},
        {"config": '{"device": "cpu"}'},
        {"config": '{"device": "cuda"}', "train_gpu_count": "1"},
    ],
)
def test_parameters_that_stages_accept_are_accepted(parameters):
    check_parameters(documents(), {"train_gpu_count": "0", "evaluate_gpu_count": "0", **parameters})


def test_names_of_runs_are_checked_with_the_seed_appended():
    name = "n" * 61
    check_parameters(documents("seeds"), {**STORE, "run": name, "seeds": ["1", "2"]})
    with pytest.raises(ConfigError, match="a name has 1 to 63"):
        check_parameters(documents("seeds"), {**STORE, "run": name, "seeds": ["1", "10"]})


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"study": "Weekly"}, "study 'Weekly': a name has"),
        ({"edition": "A b"}, "A b': a name has"),
        ({"edition": "[[Index]]"}, "nothing replaces [[Index]]"),
        ({"study": f"weekly-{TIME}"}, "replaced in run, edition, store only"),
        ({"champions": "champions"}, "parameter champions = 'champions': a directory of a pod is lost"),
        ({"champions": "s3://B/champions"}, "parameter champions: 's3://B/champions': not a location"),
        ({"champions": f"s3://bucket/{TIME}"}, "replaced in run, edition, store only"),
        ({"config": '{"device": "cpu"}', "tune_gpu_count": "1"}, "tune_gpu_count to 0"),
    ],
)
def test_combination_of_tuning_parameters_that_a_stage_would_refuse_is_refused(parameters, reason):
    check_parameters(documents("tuning"), {"edition": TIME, "store": f"s3://bucket/{TIME}"})
    with pytest.raises(ConfigError) as error:
        check_parameters(documents("tuning"), parameters)
    assert reason in str(error.value)


OF_MATRIX = {"store": "s3://bucket/runs", "cell_gpu_count": "0"}
MATRIX = {
    "name": "m",
    "seeds": [0],
    "changes": {"device": "cpu"},
    "algorithms": {"mappo": {}},
    "tasks": {"balance": {}},
}


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"store": ""}, "parameter store: empty; the cells of a matrix are kept in a store"),
        ({"store": "runs"}, "parameter store = 'runs': a directory of a pod is lost"),
        ({"store": f"s3://bucket/{TIME}/[[Index]]"}, "nothing replaces [[Index]]"),
        ({"cells": []}, "must be different names of cells"),
        ({"cells": ["balance-mappo-0"] * 2}, "must be different names of cells"),
        ({"cells": "balance-mappo-0"}, "must be a JSON list"),
        (
            {"cells": ["balance-mappo-7"]},
            "'balance-mappo-7': not a cell of the matrix first; did you mean balance-m",
        ),
        ({"matrix": "{"}, "parameter matrix: the matrix is not JSON"),
        ({"matrix": "[]"}, "parameter matrix: the matrix must be a JSON object"),
        ({"matrix": json.dumps({**MATRIX, "seeds": [0, 0]})}, "every seed may appear only once"),
        ({"matrix": json.dumps({**MATRIX, "tasks": {"balance": {"recipe": "football"}}})}, "tasks.balance.recipe"),
        ({"matrix": json.dumps({**MATRIX, "name": TIME})}, "matrix"),
        ({"matrix": json.dumps(MATRIX)}, "'navigation-mappo-0': not a cell of the matrix m"),
        (
            {"matrix": json.dumps(MATRIX), "cells": ["balance-mappo-0"], "cell_gpu_count": "1"},
            "task balance, mappo: parameter cell_gpu_count = 1: config.device = cpu leaves the GPUs of stage cell",
        ),
        ({"matrix": json.dumps({**MATRIX, "x": "x" * 10_000})}, "the server takes 10000"),
    ],
)
def test_parameter_of_a_matrix_that_a_stage_would_refuse_is_refused(parameters, reason):
    check_parameters(documents("matrix"), {**OF_MATRIX, "store": f"s3://bucket/{TIME}", "cell_gpu_count": "1"})
    with pytest.raises(ConfigError) as error:
        check_parameters(documents("matrix"), {**OF_MATRIX, **parameters})
    assert reason in str(error.value)


def test_matrix_needs_a_store():
    with pytest.raises(ConfigError, match="parameter store: missing"):
        check_parameters(documents("matrix"), {})


def test_store_without_a_run_name_is_accepted():
    check_parameters(documents(), STORE)
    check_parameters(documents("seeds"), {**STORE, "seeds": ["4294967295"]})


def test_parameters_are_checked_together_with_the_pipelines_defaults():
    compiled = documents()
    compiled[0]["root"]["inputDefinitions"]["parameters"]["store"]["defaultValue"] = "s3://bucket/runs"
    check_parameters(compiled, {"run": "nightly"})
    with pytest.raises(ConfigError, match="a name has 1 to 63"):
        check_parameters(compiled, {"run": "Nightly_1"})
    compiled[0]["root"]["inputDefinitions"]["parameters"]["config"]["defaultValue"] = '{"device": "cpu"}'
    with pytest.raises(ConfigError, match="leaves the GPUs of stage evaluate unused"):
        check_parameters(compiled, {"run": "nightly", "train_gpu_count": "0"})


def test_memory_is_checked_against_the_compiled_shm(tmp_path):
    site = check_site({"image": "a:1", "stages": {"train": {"shm": "256Mi"}}})
    compiled = compile_pipeline("training", site, {"config": to_json(recipe("balance"))}).documents
    check_parameters(compiled, {"train_memory": "900Mi"})
    with pytest.raises(ConfigError, match="shm = 256Mi, memory = 200Mi"):
        check_parameters(compiled, {"train_memory": "200Mi"})
    check_parameters(compiled, {"validate_memory": "100Mi"})


@pytest.mark.parametrize("seeds", [[], ["0", "0"], ["x"], [1], ["-1"], "0,1", [str(2**32)]])
def test_wrong_seeds_are_refused(seeds):
    with pytest.raises(ConfigError, match="seeds"):
        check_parameters(documents("seeds"), {"seeds": seeds})


def test_parameter_without_default_is_required():
    required = copy.deepcopy(specification())
    del required["root"]["inputDefinitions"]["parameters"]["config"]["defaultValue"]
    required["root"]["inputDefinitions"]["parameters"]["config"].pop("isOptional", None)
    with pytest.raises(ConfigError, match="parameter config: missing"):
        check_parameters([required], {})
    check_parameters([required], {"config": to_json(recipe("balance"))})


def test_parameters_are_parsed_by_their_declared_type():
    declared = specification()
    assert parse_parameter(declared, "train_gpu_count=1") == ("train_gpu_count", "1")
    assert parse_parameter(declared, "store=s3://a/b?c=d") == ("store", "s3://a/b?c=d")
    assert parse_parameter(declared, 'train_tolerations=[{"key": "a"}]') == ("train_tolerations", [{"key": "a"}])
    for wrong in ("store", "stores=1", "train_tolerations=[", 'train_node_selector={"a": 1, "a": 2}'):
        with pytest.raises(ConfigError):
            parse_parameter(declared, wrong)


def test_server_accepts_all_accepted_parameters():
    """Try random values of random parameters; the server must accept all that `check_parameters` accepts."""
    generator, documents_, num_accepted = random.Random(6), documents("seeds"), 0
    pipeline = documents_[0]
    declared = parameters_of(pipeline)
    values = ["", "1", "a", 1, 1.5, True, None, [], ["1"], [{}], {}, {"a": "b"}, {"key": 1}, "4Gi", "2", "a:1"]
    for _ in range(5000):
        names = generator.sample([*declared, "unknown"], generator.randint(1, 3))
        parameters = {name: generator.choice(values) for name in names}
        try:
            check_parameters(documents_, parameters)
        except ConfigError:
            continue
        num_accepted += bool(parameters)
        try:
            server_checks_parameters(pipeline, parameters)
        except Refused as error:
            pytest.fail(f"{json.dumps(parameters)}: {error}")
    assert num_accepted > 100


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"study_config": "{"}, "parameter study_config: study_config: the configuration is not JSON"),
        (
            {"study_config": '{"budget": {"hours": 20000}}'},
            "budget.hours = 20000: input should be less than 10000",
        ),
        ({"study_config": '{"budget": {"num_trials": 0}}'}, "greater than or equal to 1"),
        ({"study_config": '{"retraining": {"num_seeds": 1}}'}, "greater than or equal to 2"),
        (
            {"study_config": '{"tuning": {"prunner": "none"}}'},
            'tuning.prunner = "none": unknown key; did you mean pruner?',
        ),
        ({"study_config": '{"gate": {"confidence": 2}}'}, "gate.confidence = 2: input should be less than 1"),
        ({"study_config": '{"space": {"x": 1}}'}, "parameter study_config: space.x"),
        (
            {"study_config": '{"space": {"learner.clip_epsilon": {"type": "float", "low": 0.3, "high": 0.1}}}'},
            "low must be below high",
        ),
        ({"workers": [1]}, "must be different names, each as text"),
        ({"workers": [{"a": 1}]}, "must be different names, each as text"),
        ({"edition": "A B"}, "study 'tuning-A B': a name has"),
    ],
)
def test_study_parameter_that_a_stage_would_refuse_is_refused(parameters, reason):
    with pytest.raises(ConfigError) as error:
        check_parameters(documents("tuning"), {"study": "tuning", **parameters})
    assert reason in str(error.value)


@pytest.mark.parametrize("seed", ["00", "01", "-1", "1.0", "4294967296"])
def test_seed_that_training_would_refuse_is_refused(seed):
    with pytest.raises(ConfigError, match="must be different seeds"):
        check_parameters(documents("seeds"), {"seeds": [seed]})
