# tiercel serve in a container; it asks for a key, because other machines may reach it:
#     docker build -t tiercel . && docker run -e TIERCEL_API_KEY=… -p 127.0.0.1:11434:11434 -v tiercel:/data tiercel
# Not built by CI: the machines it runs on have no Docker.
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml CMakeLists.txt README.md LICENSE constraints.txt ./
COPY src src
RUN python -m venv /opt/tiercel \
 && /opt/tiercel/bin/pip install --no-cache-dir -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu .

FROM python:3.11-slim
# libgomp: torch's threads
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 tiercel && install -d -o tiercel /data
COPY --from=build /opt/tiercel /opt/tiercel
USER tiercel
ENV PATH=/opt/tiercel/bin:$PATH TIERCEL_HOME=/data HF_HOME=/data/hub
VOLUME /data
EXPOSE 11434
HEALTHCHECK --interval=10s --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:11434/health', timeout=5)"]
# --allow-host: how other containers of a compose file call it
CMD ["tiercel", "serve", "--host", "0.0.0.0", "--allow-host", "tiercel"]
