# A moorage server.
#
#   docker build -t moorage .                              for CPU
#   docker build -t moorage:tpu --build-arg VARIANT=tpu .  for TPU
#
# BASE is any image with Python 3.11 or 3.12 and its venv module.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG VARIANT=cpu
WORKDIR /src
COPY pyproject.toml README.md ./
COPY client client
COPY models models
COPY server server
RUN python3 -m venv /tools \
 && /tools/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .
RUN case "${VARIANT}" in \
      cpu) extra=server ;; \
      tpu) extra=tpu ;; \
      *) echo "VARIANT=${VARIANT}: wanted cpu or tpu" >&2; exit 1 ;; \
    esac \
 && python3 -m venv --without-pip /opt/moorage \
 && /tools/bin/pip --python /opt/moorage/bin/python install --no-cache-dir \
      "$(echo /wheels/moorage-*.whl)[${extra}]"

FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="moorage" \
      org.opencontainers.image.description="Keeps language models loaded, and scores token ids exactly" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# No installer stays, neither in sight nor bundled with Python; what may be written is made now,
# so that a new volume has its owner.
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/site-packages/* \
      /usr/local/lib/python3*/ensurepip /usr/lib/python3*/ensurepip /usr/share/python-wheels \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /var/cache/moorage \
      --shell /usr/sbin/nologin moorage \
 && install --directory /models \
 && install --directory --owner=10001 --group=10001 /var/cache/moorage /var/lib/moorage
COPY deploy/container/moorage.toml /etc/moorage/moorage.toml
COPY --from=build /opt/moorage /opt/moorage
ENV PATH=/opt/moorage/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/cache/moorage \
    XDG_CACHE_HOME=/var/cache/moorage \
    MOORAGE_CACHE=/var/cache/moorage \
    HF_HOME=/var/cache/moorage/huggingface \
    KAGGLEHUB_CACHE=/var/cache/moorage/kagglehub \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
VOLUME ["/tmp", "/var/cache/moorage", "/var/lib/moorage"]
EXPOSE 8470 8480
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m \
  CMD ["python", "-m", "moorage_server.probe", "127.0.0.1:8480"]
ENTRYPOINT ["moorage"]
CMD ["serve", "--config", "/etc/moorage/moorage.toml"]
