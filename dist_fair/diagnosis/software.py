"""Checks of what is installed."""

import importlib
import importlib.metadata as metadata
import platform
import re

from dist_fair.diagnosis.site import Site
from dist_fair.diagnosis.verdict import Verdict, ok, problem, warning

PACKAGES = ("dist-fair", "torch", "torchvision", "timm", "accelerate", "deepspeed", "wandb", "webdataset", "submitit",
            "numpy", "pyarrow", "opencv-python", "safetensors", "hydra-core", "omegaconf", "POT")  # fmt: skip
OLDEST_PYTHON = (3, 11)


def versions(site: Site) -> list[Verdict]:
    """Python, torch with its CUDA and NCCL, and the libraries that tickets ask for."""
    import torch

    cuda = torch.version.cuda
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda and torch.distributed.is_nccl_available() else None
    found = (
        f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {cuda or 'none'}, NCCL {nccl or 'none'}"
    )
    libraries = ", ".join(f"{name} {_version(name) or 'missing'}" for name in PACKAGES if name != "torch")
    system = f"{platform.system()} {platform.release()}, {platform.machine()}, glibc {platform.libc_ver()[1] or 'none'}"
    old = tuple(map(int, platform.python_version_tuple()[:2])) < OLDEST_PYTHON
    return [
        problem("python and torch", found, "Python 3.11 is the oldest that works", alike=True)
        if old
        else ok("python and torch", found, alike=True),
        ok("libraries", libraries, alike=True),
        ok("system", system),
    ]


def torchvision_fits(site: Site) -> Verdict:
    """A torchvision that was built for another torch fails on import, and timm with it."""
    name, fix = "torch and torchvision", "install both from one index, in one command: pip install torch torchvision"
    wanted = [text for text in metadata.requires("torchvision") or [] if re.match(r"torch\b", text)]
    pair = f"torch {_version('torch')}, torchvision {_version('torchvision')}"
    if wanted and not _met(wanted[0]):
        return problem(name, f"{pair}, which was built for {wanted[0]}", fix, alike=True)
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        return problem(name, f"{pair}: torchvision cannot be imported ({error})", fix, alike=True)
    return ok(name, f"{pair}: they fit", alike=True)


def requirements(site: Site) -> Verdict | None:
    """The versions that dist-fair asks for; None where it runs without being installed."""
    try:
        wanted = [text for text in metadata.requires("dist-fair") or [] if "extra ==" not in text]
    except metadata.PackageNotFoundError:
        return warning("requirements", "dist-fair runs without being installed", "pip install -e .", alike=True)
    unmet = [f"{text} (found {_version(_package(text)) or 'none'})" for text in wanted if not _met(text)]
    if unmet:
        return problem(
            "requirements", f"not met: {', '.join(unmet)}", "pip install -c constraints.txt -e .", alike=True
        )
    return ok("requirements", f"all {len(wanted)} met", alike=True)


def _met(requirement: str) -> bool:
    from packaging.requirements import Requirement

    parsed = Requirement(requirement)
    found = _version(parsed.name)
    if parsed.marker is not None and not parsed.marker.evaluate():
        return True
    return found is not None and parsed.specifier.contains(found, prereleases=True)


def _package(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement).group()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
