"""``python -m attn_ext.info``: what is built, for what, and what will run."""

from __future__ import annotations

import platform

import torch

import attn_ext
from attn_ext import backend


def describe() -> dict[str, str]:
    """The report's lines, label to text."""
    facts = backend.build_facts()
    problem = backend.unavailable()
    lines = {
        "attn_ext": attn_ext.__version__,
        "Python": platform.python_version(),
        "PyTorch": f"{torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}",
        "CUDA devices": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
    }
    if facts is None:
        lines["extension"] = "not compiled"
    else:
        lines["extension"] = f"built for PyTorch {facts['torch_version']} by {facts['compiler']}"
        lines["CPU kernels"] = facts["cpu_capabilities"]
        compiled = "" if problem else torch.ops.attn_ext.cuda_build()
        lines["CUDA build"] = facts["cuda"] + (f"; compiled by {compiled}" if compiled else "")
    lines["backend"] = backend.current()
    for device in ("cpu", "cuda"):
        lines[f"{device} tensors run"] = _what_runs(device)
    return lines


def _what_runs(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return "nothing: PyTorch sees no CUDA device"
    missing = backend.why_not_on(device)
    if backend.current() == "reference":
        return "reference, as chosen"
    if missing is None:
        return f"fused, {_cpu_kernels()}" if device == "cpu" else "fused"
    return f"an error: {missing}" if backend.current() == "fused" else f"reference, because {missing}"


def _cpu_kernels() -> str:
    products = "their own" if torch.ops.attn_ext.cpu_multiplies() else "PyTorch's"
    return f"{torch.ops.attn_ext.cpu_capability()} kernels, {products} float32 projections"


def main() -> None:
    for label, text in describe().items():
        print(f"{label + ':':<20}{text}")


if __name__ == "__main__":
    main()
