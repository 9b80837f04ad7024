# The service in an image: for CPUs with the demo pair inside, or for GPUs.
#
#   docker build --tag specprefill:cpu .
#   docker run --rm --network host --shm-size 1g specprefill:cpu      # the demo pair, on port 8000
#   docker build --tag specprefill:gpu --build-arg BUILD=gpu .        # needs NVIDIA's runtime to run
#
# `make image-check` runs these steps in a bare Debian, without Docker.
FROM debian:bookworm-slim

# gcc and Python's headers: kernels are compiled when they are first used, on GPUs and by Triton.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
      ca-certificates gcc libc6-dev libnuma1 python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

RUN useradd --uid 1000 --create-home ray \
 && install --directory --owner ray /opt/specprefill /etc/specprefill
USER ray
WORKDIR /opt/specprefill

COPY --chown=ray LICENSE README.md pyproject.toml ./
COPY --chown=ray requirements requirements
COPY --chown=ray services services
COPY --chown=ray models models
COPY --chown=ray cluster cluster

# cpu or gpu: vLLM's CPU build or its CUDA build.
ARG BUILD=cpu
# A folder or an index with PyTorch's CPU wheels makes the CPU image several GB smaller.
ARG PIP_FIND_LINKS=
ARG PIP_EXTRA_INDEX_URL=
RUN python3 requirements/install.py --venv .venv --build $BUILD --extras nixl \
 && rm -rf /home/ray/.cache

# A login shell, which KubeRay starts Ray in, sets a PATH of its own.
USER root
RUN for program in ray serve specprefill specprefill-front; do \
      ln -s /opt/specprefill/.venv/bin/$program /usr/local/bin/$program; \
    done
USER ray

# Every process of Ray reads these: see docs/deployment.md.
ENV PATH=/opt/specprefill/.venv/bin:/usr/local/bin:/usr/bin:/bin \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_SERVE_ENABLE_HA_PROXY=1 \
    RAY_SERVE_USE_GRPC_BY_DEFAULT=1 \
    RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0 \
    RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0 \
    RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH=268435456 \
    RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=660 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=specprefill.gateway.grpc.serve_ports:setup \
    RAY_SERVE_HAPROXY_BINARY_PATH=/opt/specprefill/.venv/bin/specprefill-front \
    SPECPREFILL_DEPLOYMENT_FILE=/etc/specprefill/deployment/deployment.yaml

CMD ["specprefill", "serve", "cluster/local.yaml"]
