# The server of docs/serve.md, on the CPU.   docker build -t modelpatch . && docker run -p 127.0.0.1:8000:8000 -v ./patches:/patches modelpatch
FROM python:3.11-slim
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 MODELPATCH_BACKBONE=bundled:tiny
RUN pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install '.[serve,compress]' && useradd --create-home --uid 1000 modelpatch && mkdir /patches && chown modelpatch /patches
USER modelpatch
VOLUME /patches
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=5)"]
CMD ["sh", "-c", "exec modelpatch serve /patches --backbone \"$MODELPATCH_BACKBONE\" --host 0.0.0.0"]
