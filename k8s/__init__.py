"""The manifests with which a cluster runs and monitors pipelines, and the programs that generate some of them."""
