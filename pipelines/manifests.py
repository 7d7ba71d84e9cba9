"""Write a compiled pipeline as objects of Kubernetes, for a Kubeflow that keeps its pipelines there."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from pipelines.compiling import Compiled


def kubernetes_manifests(compiled: Compiled) -> str:
    """Return the Pipeline and the PipelineVersion of a compiled pipeline as YAML, in the format of Kubeflow's SDK.

    Kubeflow refuses to change a PipelineVersion. So its name holds a hash of the pipeline, and another pipeline
    becomes another version.
    """
    from kfp import compiler, components  # imported here, since it takes a second
    from kfp.compiler.compiler_utils import KubernetesManifestOptions

    options = KubernetesManifestOptions(
        pipeline_name=compiled.name,
        pipeline_version_name=f"{compiled.name}-{re.sub('[^a-z0-9.]', '-', compiled.version.lower())}",
        pipeline_version_display_name=compiled.version,
        include_pipeline_manifest=True,
    )
    with TemporaryDirectory() as directory:
        path = Path(directory, "pipeline.yaml")
        compiler.Compiler().compile(
            components.load_component_from_text(compiled.text),
            str(path),
            kubernetes_manifest_options=options,
            kubernetes_manifest_format=True,
        )
        return yaml.safe_dump_all(yaml.safe_load_all(path.read_text()), sort_keys=True, width=115)
