# The image of every stage: Python, this package with its locked dependencies, Kubeflow's executor, and the C++ compiler that
# training uses. It has no pip and, without EXTRAS, no Kubeflow client. /opt/mappo/sbom holds its bills of materials.
# `make image` builds it.
#
#   BASE_IMAGE   Debian with Python 3.11 or newer as python3, and its venv module; g++ and Python's headers are
#                installed if it lacks them
#   TORCH_INDEX  the index for torch: that of its CPU wheels, or https://pypi.org/simple, whose Linux wheel is the CUDA build
#   EXTRAS       extras of this package, separated by commas; kubeflow adds Kubeflow's client, for `python -m pipelines`;
#                mlflow adds MLflow's client, with which stages log to an MLflow server
#   secret pip   a pip.conf, for an index of your own
ARG BASE_IMAGE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS base
# hadolint ignore=DL3008
RUN if ! command -v g++ || ! test -e "$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h"; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends g++ \
        && { test -e "$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" \
            || apt-get install --yes --no-install-recommends libpython3-dev; } \
        && rm -rf /var/lib/apt/lists/*; \
    fi

FROM base AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=
ENV PIP_CONSTRAINT=/build/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY constraints.txt pyproject.toml ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    EXTRAS="$EXTRAS" python3 -c 'import os, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = [project["optional-dependencies"][extra] for extra in os.environ["EXTRAS"].split(",") if extra]; \
print(*sum(extras, project["dependencies"]), sep="\n")' \
        > requirements.txt \
    && python3 -m venv /opt/mappo \
    && /opt/mappo/bin/pip install --no-deps --index-url "$TORCH_INDEX" torch \
    && /opt/mappo/bin/pip install -r requirements.txt \
    && /opt/mappo/bin/pip install --no-deps kfp \
    && python3 -m venv /opt/tools \
    && /opt/tools/bin/pip install cyclonedx-bom debsbom setuptools
COPY LICENSE README.md ./
COPY components components
COPY mappo mappo
COPY pipelines pipelines
RUN /opt/tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
    && /opt/mappo/bin/pip install --no-deps dist/*.whl \
    && /opt/mappo/bin/pip uninstall --yes pip \
    && mkdir /opt/mappo/sbom \
    && /opt/tools/bin/cyclonedx-py environment --output-file /opt/mappo/sbom/python.cdx.json /opt/mappo/bin/python3 \
    && /opt/tools/bin/debsbom generate --sbom-type cdx --out /opt/mappo/sbom/debian

FROM base
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
ARG BASE_IMAGE
LABEL org.opencontainers.image.title="mappo" \
      org.opencontainers.image.description="MAPPO experiments on VMAS: the stages of its Kubeflow pipelines" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
COPY --from=build /opt/mappo /opt/mappo
# Stages write to /tmp only, the one directory that must be writable. The user is numeric, as runAsNonRoot requires. It has
# no entry in /etc/passwd, so USER and LOGNAME hold a name for libraries that ask for the user's name.
ENV PATH=/opt/mappo/bin:$PATH HOME=/tmp USER=mappo LOGNAME=mappo PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /tmp
USER 10001:10001
ENTRYPOINT ["mappo"]
CMD ["--help"]
