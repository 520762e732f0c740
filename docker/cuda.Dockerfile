# TokenSpeed on an NVIDIA GPU: docker build -f docker/cuda.Dockerfile -t tokenspeed:cuda .
# torch and the extra gpu bring CUDA's libraries; the host needs a driver for CUDA 13 and NVIDIA's container toolkit.
FROM python:3.12-slim-bookworm
# g++ builds the CPU kernels, and triton compiles its launchers with it when a model is first started.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY tokenspeed tokenspeed
RUN python -m venv /opt/tokenspeed \
 && /opt/tokenspeed/bin/pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cu130 '.[gpu]' \
 && useradd --create-home --uid 10001 tokenspeed && mkdir /cache && chown tokenspeed /cache
USER 10001
WORKDIR /home/tokenspeed
ENV PATH=/opt/tokenspeed/bin:$PATH XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=30m --interval=15s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["tokenspeed", "serve", "--host", "0.0.0.0"]
