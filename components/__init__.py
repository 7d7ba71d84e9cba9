"""One file, one stage, one Kubeflow component.

Each body reads inputs, calls `mappo.stages.runtime`, writes outputs. In a pod, `python -m components` runs such
a file: `components/__main__.py`.
"""

import os
from collections.abc import Callable
from typing import Any

IN_POD = "_KFP_RUNTIME"  # Kubeflow's own variable: the part of kfp that compiles is not loaded


def component(function: Callable[..., Any]) -> Any:
    """Make a stage's function a Kubeflow component; in the process of a stage it stays the function."""
    if os.environ.get(IN_POD) == "true":
        return function
    from kfp import dsl

    return dsl.component(function, base_image="python", install_kfp_package=False)
