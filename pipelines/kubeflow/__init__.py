"""The part of the pipelines that talks to a Kubeflow server. Open `client.py` first."""
