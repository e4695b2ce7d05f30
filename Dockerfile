# syntax=docker/dockerfile:1
# docker build -t haomiao . && docker run --rm haomiao generate "Once upon a time"
# Models that are downloaded or converted live in /home/haomiao/.cache: mount a volume there to keep them.
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --wheel-dir /wheels .

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 haomiao
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels haomiao
USER haomiao
WORKDIR /home/haomiao
VOLUME /home/haomiao/.cache
ENTRYPOINT ["haomiao"]
CMD ["--help"]
