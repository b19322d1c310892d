# vLLM's official image with vllm-dwdp and CuPy, added as vLLM's documentation adds packages. Not built yet.
#
#   docker build -t vllm-dwdp .
#   docker run --rm --gpus all --ipc=host --entrypoint vllm-dwdp vllm-dwdp doctor
#   docker run --rm --gpus all --ipc=host -p 8000:8000 vllm-dwdp MODEL \
#       --distributed-executor-backend dwdp --data-parallel-size 4
FROM vllm/vllm-openai:v0.32.0
COPY pyproject.toml setup.py README.md /opt/vllm-dwdp/
COPY vllm_dwdp /opt/vllm-dwdp/vllm_dwdp
COPY kernels /opt/vllm-dwdp/kernels
# Beyond vLLM only NumPy and CuPy are asked for: what the image has stays.
RUN uv pip install --system "/opt/vllm-dwdp[cuda13]"
