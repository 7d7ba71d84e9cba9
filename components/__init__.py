"""One file, one stage, one Kubeflow component. Each body reads inputs, calls `mappo.stages`, writes outputs."""
