# TokenSpeed on a CPU, with the demo model: docker build -f docker/cpu.Dockerfile -t tokenspeed:cpu .
FROM python:3.12-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt CMakeLists.txt README.md LICENSE ./
COPY tokenspeed tokenspeed
RUN python -m venv /opt/tokenspeed \
 && PIP_CONSTRAINT=constraints.txt /opt/tokenspeed/bin/pip install --no-cache-dir \
    --extra-index-url https://download.pytorch.org/whl/cpu '.[demo]'

FROM python:3.12-slim-bookworm
RUN useradd --create-home --uid 10001 tokenspeed && mkdir /cache && chown tokenspeed /cache
COPY --from=build /opt/tokenspeed /opt/tokenspeed
USER 10001
ENV PATH=/opt/tokenspeed/bin:$PATH XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=10m --interval=15s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["tokenspeed", "serve", "--host", "0.0.0.0"]
CMD ["--chat-template", "plain"]
