# A moorage server.
#
#   docker build -t moorage .                          CPU
#   docker build -t moorage --build-arg EXTRA=tpu .    TPU
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG EXTRA=server
WORKDIR /src
COPY pyproject.toml README.md ./
COPY client client
COPY models models
COPY server server
RUN python3 -m venv /opt/moorage \
 && /opt/moorage/bin/pip install --no-cache-dir --disable-pip-version-check ".[${EXTRA}]"

FROM ${BASE}
COPY --from=build /opt/moorage /opt/moorage
RUN useradd --uid 10001 --create-home moorage && mkdir /models /cache && chown moorage /cache
USER moorage
ENV PATH=/opt/moorage/bin:$PATH HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache
VOLUME ["/models", "/cache"]
EXPOSE 8470
ENTRYPOINT ["moorage", "serve"]
CMD ["--listen", "0.0.0.0:8470", "--root", "/models"]
