# Serves the bundled model (or one mounted at /model: `docker run ... nextflow-ar -m /model`) on CPUs.
FROM python:3.12-slim

# PyTorch's CPU index spares the image gigabytes: docker build --build-arg TORCH_INDEX=...
ARG TORCH_INDEX=
RUN useradd --create-home --uid 1000 server
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN python -m pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} 'torch>=2.11' \
    && python -m pip install --no-cache-dir '.[serve]'

USER server
ENV HF_HUB_OFFLINE=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
# SIGTERM reaches the server itself, which finishes what is under way: give `docker stop` more than --grace seconds.
ENTRYPOINT ["nextflow-ar", "serve", "--host", "0.0.0.0", "--port", "8000"]
