"""The one thing that pyproject.toml cannot say: the folder kernels/ is installed as vllm_dwdp.kernels."""

from setuptools import find_packages, setup

plugin = find_packages(include=["vllm_dwdp", "vllm_dwdp.*"])
kernels = [f"vllm_dwdp.{name}" for name in find_packages(include=["kernels", "kernels.*"], exclude=["kernels.bench"])]

setup(
    packages=plugin + kernels,
    package_dir={"vllm_dwdp.kernels": "kernels"},
    package_data={"vllm_dwdp.kernels": ["configs/*.json"]},
)
