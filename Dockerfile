# The project with its environment, for a CPU or for NVIDIA's cards.
#
#     docker build -t rlhf .                                  # CPU
#     docker build -t rlhf-cuda --build-arg CUDA=13 .         # or 12; the host has the driver and
#                                                             # the NVIDIA Container Toolkit
#     docker run --rm -v "$PWD/runs:/rlhf/runs" rlhf          # make all-three; or, for example,
#     docker run --rm -v "$PWD/runs:/rlhf/runs" --gpus all rlhf-cuda python ppo.py --seed 1
#
# No container engine was at hand to build it. Its steps were tried by chroot, in a root made by
# `debootstrap --variant=minbase bookworm`: both RUN lines for a CPU; COPY, by `git archive HEAD`;
# then `make -n all-three`, which finds the environment ready, and `make smoke`, which ran all
# scripts. Of CUDA=13, pip only said what it would install (--dry-run). Not tried: the base image
# itself, .dockerignore, CMD, a card.
FROM debian:bookworm-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv make curl ca-certificates \
    && rm -rf /var/lib/apt/lists/*

# The packages come before the code: a change of the code does not install them again.
ARG CUDA=""
WORKDIR /rlhf
COPY requirements.txt ./
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --requirement requirements.txt ${CUDA:+"jax[cuda$CUDA]"} \
    && touch .venv/ready
COPY . ./

ENV PATH="/rlhf/.venv/bin:$PATH"
CMD ["make", "all-three"]
