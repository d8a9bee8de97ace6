# docker build -f docker/cpu.Dockerfile -t kedit-fast --build-arg INDEX=URL .
# INDEX: a package index with CPU builds of torch (the selector on pytorch.org names it); else torch brings CUDA along.
FROM python:3.12-slim
ARG INDEX
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN KEDIT_FAST_NATIVE=1 PIP_EXTRA_INDEX_URL="$INDEX" pip install --no-cache-dir -c constraints.txt .
RUN cd / && python /src/tests/smoke.py --native yes
WORKDIR /work
ENTRYPOINT ["kedit-fast"]
