# The server of docs/serve.md, on the CPU.   docker build -t modelpatch . && docker run -p 127.0.0.1:8000:8000 -v ./patches:/patches modelpatch
FROM python:3.11-slim
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 MODELPATCH_BACKBONE=bundled:tiny
WORKDIR /app
COPY requirements/server.txt requirements/
RUN pip install --no-deps --require-hashes -r requirements/server.txt
# the builds for the CPU, a tenth of the others' size, are in PyTorch's own index; their versions are those of requirements/ci.txt
RUN pip install --no-deps torch==2.14.1 torchvision==0.29.1 --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-deps --no-build-isolation . && useradd --create-home --uid 1000 modelpatch && mkdir /patches && chown modelpatch /patches
USER modelpatch
VOLUME /patches
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=5)"]
CMD ["sh", "-c", "exec modelpatch serve /patches --backbone \"$MODELPATCH_BACKBONE\" --host 0.0.0.0"]
