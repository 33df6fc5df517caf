# A training machine: docker build -t cactus-edge . && mkdir -p runs && chmod a+w runs && docker run \
#   --rm -v "$PWD/runs:/home/cactus/runs" cactus-edge train /app/recipes/digits.toml --output runs/digits
# CPUs by default; `--build-arg TORCH=cuda` takes the wheel with CUDA (run with `--gpus all`).
FROM python:3.11-slim

ARG TORCH=cpu
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY tools/install_torch.py tools/
RUN CACTUS_EDGE_TORCH=$TORCH python tools/install_torch.py
COPY cactus_edge cactus_edge
COPY firmware_sim firmware_sim
COPY recipes recipes
RUN pip install --no-cache-dir -c constraints.txt '.[train,images,onnx,report,runtimes,sign,sim,verify]'

# Data sets and compiled kernels are kept in the home folder: mount it to keep them longer.
RUN useradd --create-home --uid 1000 cactus
USER cactus
WORKDIR /home/cactus
ENTRYPOINT ["cactus-edge"]
CMD ["--help"]
