FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    BUILDRELAY_DATA_DIR=/data

WORKDIR /app
COPY requirements.txt .
RUN pip install --require-hashes --no-deps -r requirements.txt

COPY . .
RUN pip install --no-deps --no-build-isolation . \
    && useradd --system --home-dir /data buildrelay \
    && install -d -o buildrelay -g buildrelay -m 700 /data

USER buildrelay
WORKDIR /data
VOLUME /data
EXPOSE 8000

# No `--init` is needed: `up` sees the processes gone whose parent died.
ENTRYPOINT ["buildrelay"]
CMD ["up", "--host", "0.0.0.0"]
