# docker build -f docker/cuda.Dockerfile -t kedit-fast-cuda . ; docker run --gpus all kedit-fast-cuda info
# The package index's torch brings CUDA along; the compiler stays, because Triton builds its launchers at run time.
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN KEDIT_FAST_NATIVE=1 pip install --no-cache-dir -c constraints.txt '.[triton]'
RUN cd / && python /src/tests/smoke.py --native yes
WORKDIR /work
ENTRYPOINT ["kedit-fast"]
