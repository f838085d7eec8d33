# vlmq's images, one target each:
#
#   api         the HTTP API and the command line; no tensor library
#   cpu         everything on one machine without a GPU, with the bundled tiny model
#   inference   workers with the lmdeploy engine, for machines with NVIDIA GPUs
#   training    fine-tuning alone: xtuner needs another transformers than lmdeploy
#   gpu         inference and training in one container, each in an environment of its own, so that
#               engines can lend their GPUs to fine-tunes
#
#   docker build --target api -t vlmq-api:0.1.0 .
#
# The GPU images start from plain Python as well: the wheels of torch and lmdeploy bring CUDA's
# libraries (12 for TurboMind, 13 for torch; their run paths point at each other) and the host's
# NVIDIA driver is mounted by its container toolkit. A CUDA base would hold them a second time.
#
# Tags are exact, but a tag can be moved. To pin content, append @sha256:… as shown by
# `docker buildx imagetools inspect IMAGE`.

# What everything was measured with on processors.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

# --- what building and running have in common ---
FROM ${PYTHON_IMAGE} AS python
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PATH=/opt/vlmq/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# Fixed, so that the owner of a shared folder is the same on every machine.
RUN groupadd --gid 10001 vlmq \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home \
        --home-dir /var/lib/vlmq --shell /usr/sbin/nologin vlmq \
    && install --directory --owner vlmq --group vlmq --mode 0700 \
        /var/lib/vlmq /var/cache/vlmq /run/vlmq

# --- environments: first the dependencies, which change rarely, then vlmq itself ---
FROM python AS environment
WORKDIR /src
ENV VIRTUAL_ENV=/opt/vlmq \
    UV_COMPILE_BYTECODE=1 \
    UV_NO_CACHE=1
RUN pip install --no-cache-dir uv==0.13.9 \
    && uv venv --python /usr/local/bin/python3 /opt/vlmq
COPY pyproject.toml ./

FROM environment AS api-environment
COPY locks/cpu.txt locks/
RUN uv pip install --requirements pyproject.toml --extra api --constraints locks/cpu.txt
COPY . .
RUN uv pip install --no-deps .

FROM environment AS cpu-environment
COPY locks/cpu.txt locks/
# First and alone, from the index of builds without CUDA, which are several gigabytes smaller; what
# it needs comes with the rest.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN uv pip install --no-deps --index-url "${TORCH_INDEX}" "$(grep '^torch==' locks/cpu.txt)"
RUN uv pip install --requirements pyproject.toml --extra api --extra cpu --extra parquet \
        --constraints locks/cpu.txt
COPY . .
RUN uv pip install --no-deps .

FROM environment AS inference-environment
COPY locks/inference.txt locks/
RUN uv pip install --requirements pyproject.toml --extra api --extra inference --extra parquet \
        --constraints locks/inference.txt
COPY . .
RUN uv pip install --no-deps .

FROM environment AS training-environment
COPY locks/training.txt locks/
RUN uv pip install --requirements pyproject.toml --extra cpu --extra training \
        --constraints locks/training.txt
COPY . .
RUN uv pip install --no-deps .

# --- what is run: an environment on a clean base, as a user without rights ---
FROM python AS runtime
ENV HOME=/var/lib/vlmq \
    XDG_CACHE_HOME=/var/cache/vlmq \
    VLMQ_STORAGE__DATA_DIR=/var/lib/vlmq \
    VLMQ_STORAGE__RUN_DIR=/run/vlmq
WORKDIR /var/lib/vlmq
STOPSIGNAL SIGTERM

FROM runtime AS gpu-runtime
# Triton compiles a small C module for the kernels of lmdeploy's PyTorch backend and of training.
# Debian keeps only the newest version of a package, so a pinned one would stop building.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/var/cache/vlmq/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/vlmq/inductor

FROM runtime AS api
COPY --from=api-environment /opt/vlmq /opt/vlmq
USER 10001:10001
EXPOSE 8000
CMD ["python", "-m", "api.server", "--config", "/etc/vlmq/node.toml"]

FROM runtime AS cpu
COPY --from=cpu-environment /opt/vlmq /opt/vlmq
USER 10001:10001
EXPOSE 8000
CMD ["vlmq", "up"]

FROM gpu-runtime AS training
COPY --from=training-environment /opt/vlmq /opt/vlmq
USER 10001:10001
ENV VLMQ_NODE__ROLES='["finetune"]'
CMD ["vlmq", "worker", "--config", "/etc/vlmq/node.toml"]

FROM gpu-runtime AS inference
COPY --from=inference-environment /opt/vlmq /opt/vlmq
USER 10001:10001
CMD ["vlmq", "worker", "--config", "/etc/vlmq/node.toml"]

FROM inference AS gpu
# Found by its own pyvenv.cfg, an environment works wherever it is put when it is run as python -m.
COPY --from=training-environment /opt/vlmq /opt/training
ENV VLMQ_FINETUNE__PYTHON=/opt/training/bin/python
