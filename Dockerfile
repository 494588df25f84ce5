# For a Runpod pod (or any host with the NVIDIA container runtime) with one RTX 4090 and driver 580 or newer; with a driver
# from 525 on, the same torch for CUDA 12.6 comes from PyTorch's own index (not built here):
#
#   docker build -t finetune .
#   docker build -t finetune --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
#   docker run --gpus all -v VOLUME:/workspace finetune run_dpo.py --recipe llama31_8b
#
# Models, data sets and runs/ go to /workspace, where Runpod mounts a pod's volume, so a pod that was stopped goes on where
# it was. Kernels that Triton and Inductor compile stay on the container's own disk: they are many small files, slow on a
# network volume. To keep them all the same: -e TRITON_CACHE_DIR=/workspace/.cache/triton
# -e TORCHINDUCTOR_CACHE_DIR=/workspace/.cache/inductor. A gated model needs a token at run time: -e HF_TOKEN, never in the image.

# torch's wheels bring their own CUDA libraries, so a CUDA base image would carry a second copy of some 2 GB. The driver
# comes from the host. gcc is for Triton, which compiles its launcher when a kernel is first used, g++ for Inductor's CPU code.
FROM python:3.12-slim-bookworm

# Debian's archive drops old versions, so a pinned gcc would stop building.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /opt/finetune

# The Makefile's steps, without the tools for tests. One layer each: a change to the toolkit fetches none of them again,
# and a new Unsloth leaves the gigabytes of torch alone.
COPY requirements.txt ./
ARG TORCH_INDEX=
RUN if [ -n "$TORCH_INDEX" ]; then python -m pip install --no-deps --index-url "$TORCH_INDEX" torch -c requirements.txt; fi
RUN python -m pip install -r requirements.txt
COPY requirements-unsloth.txt ./
RUN python -m pip install --no-deps -r requirements-unsloth.txt
COPY requirements-gpu.txt ./
RUN python -m pip install -c requirements.txt -r requirements-gpu.txt
COPY requirements-xformers.txt ./
RUN { python -m pip install --no-deps --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cu130}" -r requirements-xformers.txt \
    && python -c 'from xformers._cpp_lib import _register_extensions as load; load()'; } \
    || { python -m pip uninstall -y xformers; echo "attention: torch's SDPA; xFormers is left out, no build loads here"; }
COPY requirements-optional.txt requirements-quantise.txt ./
RUN python -m pip install -c requirements.txt -r requirements-optional.txt
RUN python -m pip install --no-deps -r requirements-quantise.txt

COPY recipes recipes
COPY toolkit toolkit
COPY run_*.py ./
RUN ln -s /workspace/runs runs

ENV HF_HOME=/workspace/huggingface \
    XDG_CACHE_HOME=/workspace/.cache \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1

# The volume is empty at first: runs/ has to exist behind the link. Python then takes the shell's place, so that it gets
# the signal when the pod is stopped.
ENTRYPOINT ["/bin/sh", "-c", "mkdir -p /workspace/runs && exec python \"$@\"", "python"]
CMD ["run_sft.py", "--help"]
