# For a Runpod pod (or any host with the NVIDIA container runtime) with one RTX 4090 and driver 580 or newer.
#
#   docker build -t finetune .
#   docker run --gpus all -v VOLUME:/workspace finetune run_dpo.py --recipe llama31_8b
#
# Models, data sets, compiled kernels and runs/ go to /workspace, where Runpod mounts a pod's volume, so a pod that was
# stopped goes on where it was. A gated model needs a token at run time: -e HF_TOKEN, never in the image.

# torch's wheels bring their own CUDA libraries, so a CUDA base image would carry a second copy of some 2 GB. The driver
# comes from the host. gcc is for Triton, which compiles its launcher when a kernel is first used.
FROM python:3.12-slim-bookworm

# Debian's archive drops old versions, so a pinned gcc would stop building.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /opt/finetune

# The Makefile's steps, without the tools for tests. One layer each: a change to the toolkit fetches none of them again,
# and a new Unsloth leaves the gigabytes of torch alone.
COPY requirements.txt ./
RUN python -m pip install -r requirements.txt
COPY requirements-unsloth.txt ./
RUN python -m pip install --no-deps -r requirements-unsloth.txt
COPY requirements-gpu.txt ./
RUN python -m pip install -c requirements.txt -r requirements-gpu.txt
COPY requirements-optional.txt ./
RUN python -m pip install -c requirements.txt -r requirements-optional.txt

COPY recipes recipes
COPY toolkit toolkit
COPY run_*.py ./
RUN ln -s /workspace/runs runs

ENV HF_HOME=/workspace/huggingface \
    XDG_CACHE_HOME=/workspace/.cache \
    TRITON_CACHE_DIR=/workspace/.cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/workspace/.cache/inductor \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1

# The volume is empty at first: runs/ has to exist behind the link. Python then takes the shell's place, so that it gets
# the signal when the pod is stopped.
ENTRYPOINT ["/bin/sh", "-c", "mkdir -p /workspace/runs && exec python \"$@\"", "python"]
CMD ["run_sft.py", "--help"]
