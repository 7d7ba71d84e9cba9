"""The Kubeflow components, one file for each stage.

The function of a component reads its inputs, calls the stage in `mappo.stages` and writes its outputs. In a pod,
`python -m components` runs it: see `components/__main__.py`.
"""

import os
from collections.abc import Callable
from typing import Any

IN_POD = "_KFP_RUNTIME"  # Kubeflow's own variable; if it is true, kfp does not load its compiler


def component(function: Callable[..., Any]) -> Any:
    """Turn a stage's function into a Kubeflow component; in a stage's own process, return the plain function."""
    if os.environ.get(IN_POD) == "true":
        return function
    from kfp import dsl

    return dsl.component(function, base_image="python", install_kfp_package=False)
