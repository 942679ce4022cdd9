# Edit Anatomy in a container, on the CPU.
#
#   docker build -t edit-anatomy .
#   docker run --rm -p 127.0.0.1:8501:8501 -v edit-anatomy-cache:/data edit-anatomy
#
# On a GPU: give the torch build for your driver and, if your index has it elsewhere, that index:
#   docker build -t edit-anatomy:gpu --build-arg TORCH="torch==2.13.0+cu130" --build-arg TORCH_INDEX=URL --build-arg DEVICE=auto .
#   docker run --rm --gpus all -p 127.0.0.1:8501:8501 -v edit-anatomy-cache:/data edit-anatomy:gpu
#
# To serve it under another name, allow that name too: -e STREAMLIT_SERVER_ALLOWED_HOSTS="localhost edits.example.org"
#
# The embedded models are inside. The container never asks the network for a model (HF_HUB_OFFLINE=1); to use models of the
# Hugging Face hub that are already on the host, mount its cache: -v ~/.cache/huggingface:/hub:ro -e HF_HOME=/hub
FROM python:3.11-slim

ARG TORCH="torch==2.13.0"
ARG TORCH_INDEX=""
ARG DEVICE="cpu"

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    MEGA_CACHE_DIR=/data \
    MEGA_DEVICE=${DEVICE} \
    STREAMLIT_SERVER_PORT=8501 \
    STREAMLIT_SERVER_HEADLESS=true \
    STREAMLIT_BROWSER_SERVER_ADDRESS=localhost
# The last one names the address to print at the start; without it Streamlit asks another host for this machine's.

# The only folder the app may write to belongs to the app's user alone; the code stays root's and read-only to it.
RUN useradd --create-home --uid 10001 --shell /usr/sbin/nologin app \
    && install -d -o app -g app -m 0700 /data

WORKDIR /app

# torch first and from its own index; any build of the pinned version satisfies requirements.txt afterwards.
COPY requirements.txt ./
# hadolint ignore=DL3013
RUN pip install ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "${TORCH}" \
    && pip install -r requirements.txt

COPY LICENSE README.md pyproject.toml app.py ./
COPY .streamlit ./.streamlit
COPY pages ./pages
COPY mega_core ./mega_core

USER 10001
VOLUME ["/data"]
EXPOSE 8501

# Loading a model is not part of being healthy: the first page is drawn without one.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['STREAMLIT_SERVER_PORT'] + '/_stcore/health', timeout=4)"]

CMD ["streamlit", "run", "app.py", "--server.address", "0.0.0.0"]
