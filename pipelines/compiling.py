"""Compile a configuration and a site to the YAML that Kubeflow runs; refuse a pipeline with a known defect."""

import difflib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

import mappo
from mappo.config import ExperimentConfig, override
from mappo.errors import ConfigError
from mappo.strict_json import parse_json
from pipelines.guards import check_specification
from pipelines.site import Site
from pipelines.slimming import slim

NAMES = ("training", "seeds", "tuning", "matrix")


@dataclass(frozen=True)
class Compiled:
    """A compiled pipeline: the YAML that Kubeflow reads."""

    text: str

    @cached_property
    def documents(self) -> list[dict[str, Any]]:
        """The documents of the YAML: the pipeline's specification, then its settings for Kubernetes."""
        return [document for document in yaml.safe_load_all(self.text) if document]

    @property
    def specification(self) -> dict[str, Any]:
        """The first document: the pipeline's specification."""
        return self.documents[0]

    @property
    def name(self) -> str:
        """The name by which Kubeflow lists the pipeline."""
        return str(self.specification["pipelineInfo"]["name"])

    @property
    def version(self) -> str:
        """The name of this version of the pipeline: the version of mappo, and a hash of the content."""
        return f"{mappo.__version__}-{hashlib.sha256(self.text.encode()).hexdigest()[:12]}"

    @property
    def body(self) -> dict[str, Any]:
        """The pipeline as a JSON object, as the API expects it in the request for a run."""
        return dict(zip(("pipeline_spec", "platform_spec"), self.documents, strict=False))


def compile_pipeline(name: str, site: Site, defaults: Mapping[str, Any], parallel_seeds: int = 0) -> Compiled:
    """Compile the pipeline called `name`, one of `NAMES`.

    `defaults` are default values of its parameters. `parallel_seeds` is the largest number of seeds, or of cells
    of a matrix, that train at once; 0 sets no limit.

    Raises:
        ConfigError: the site has no image, or the compiled pipeline has a known defect.
    """
    if site.image is None:
        raise ConfigError("no image: give --image NAME:TAG, or `image` in the site's file")
    from kfp import compiler  # imported here, since it takes a second

    from pipelines.matrix import make_matrix_pipeline
    from pipelines.seeds import make_seeds_pipeline
    from pipelines.training import make_training_pipeline
    from pipelines.tuning import make_tuning_pipeline

    makers: dict[str, Callable[[], Callable[..., Any]]] = {
        "training": lambda: make_training_pipeline(site),
        "seeds": lambda: make_seeds_pipeline(site, parallel_seeds),
        "tuning": lambda: make_tuning_pipeline(site, parallel_seeds),
        "matrix": lambda: make_matrix_pipeline(site, parallel_seeds),
    }
    with TemporaryDirectory() as directory:
        path = Path(directory, "pipeline.yaml")
        compiler.Compiler().compile(makers[name](), str(path), pipeline_parameters=dict(defaults))
        documents = [document for document in yaml.safe_load_all(path.read_text()) if document]
    slim(documents[0], site)
    compiled = Compiled(yaml.safe_dump_all(documents, sort_keys=True, width=115))
    check_specification(compiled.text, compiled.documents)
    return compiled


def read_compiled(path: Path) -> Compiled:
    """Read a compiled pipeline from a file.

    Raises:
        ConfigError: the file is not a compiled pipeline, or the pipeline has a known defect.
        OSError: the file cannot be read.
    """
    try:
        compiled = Compiled(path.read_text())
        is_pipeline = {"root", "components", "deploymentSpec", "pipelineInfo"} <= set(compiled.specification)
    except (yaml.YAMLError, UnicodeDecodeError, IndexError, TypeError):
        is_pipeline = False
    if not is_pipeline:
        raise ConfigError(f"{path}: not a compiled pipeline; `python -m pipelines compile` writes one")
    try:
        check_specification(compiled.text, compiled.documents)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    return compiled


def difference(path: Path, text: str) -> list[str]:
    """Return a unified diff from a file to the text that was compiled now; empty if they are equal."""
    current = path.read_text() if path.exists() else ""
    lines = difflib.unified_diff(
        current.splitlines(), text.splitlines(), f"{path}", f"{path}, compiled now", n=1, lineterm=""
    )
    return list(lines)


def read_seeds(text: str, config: ExperimentConfig) -> list[str]:
    """Read the value of `--seeds`, such as 0,1,2.

    Raises:
        ConfigError: one of the values is not a seed, or appears twice.
    """
    seeds = [seed.strip() for seed in text.split(",")]
    for seed in seeds:
        try:
            override(config, {"seed": parse_json(seed)})
        except ValueError as error:
            raise ConfigError(f"--seeds {text}: {seed!r}: {error}") from None
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text}: every seed may appear once")
    return seeds
