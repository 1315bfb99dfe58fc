# mmscale in a container. CPU by default; for CUDA 12.8 wheels of torch: --build-arg TORCH=cu128 (run with --gpus all).
#
#   docker build -t mmscale .
#   docker run --rm -v "$PWD/runs:/mmscale/runs" mmscale train configs/quickstart.yaml
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# DeepSpeed is built from source and imports setuptools; it compiles no kernel here. Tini passes signals on: a run saves
# and stops on SIGTERM.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*

ARG TORCH=cpu
# hadolint ignore=DL3013
RUN pip install --no-cache-dir uv && uv pip install --system --no-cache --torch-backend "${TORCH}" torch torchvision

WORKDIR /mmscale
COPY pyproject.toml README.md LICENSE ./
COPY mmscale ./mmscale
COPY data_pipeline ./data_pipeline
COPY launchers ./launchers
ARG EXTRAS=hf
# The ranges of versions are in pyproject.toml.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[${EXTRAS}]" \
    && rm -rf build mmscale.egg-info mmscale data_pipeline launchers
COPY configs ./configs
COPY examples ./examples

ENV OMP_NUM_THREADS=1
ENTRYPOINT ["tini", "--", "mmscale"]
CMD ["--help"]
