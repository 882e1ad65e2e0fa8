"""What of a step torch.compile is given, and where what it made is kept.

The forward pass of a step is detector, objectives, and collectives between them. Compiled are the hooks of each
intervention, one by one: each is a pure function of tensors, whose shapes are those of the batch, and is traced once.
Collectives stay outside, they are the seams; so do the weights of the terms, which change from step to step. With "all"
the detector's two steps are compiled too, which is most of the time it takes.

Under DDP a compiled detector hands over all of its gradients at the end of its backward pass: their all-reduce hides
behind less of it than that of a detector that is not compiled.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from dist_fair.engine.module import TrainingModule
from dist_fair.interventions.base import Intervention

_HOOKS = ("transform", "weigh", "summarise", "objective")
_VERBS = ("replicated_sum", "replicated_gather", "shared_sum", "sum", "maximum", "gather", "exchange_columns")
_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compile_module(module: TrainingModule, what: str) -> str | None:
    """Compiles "none", the "objectives", or "all" of a module, in place; what to tell the user, if anything.

    Nothing is compiled before it first runs. What is compiled is kept on disk, and found again by later runs: in
    $TORCHINDUCTOR_CACHE_DIR, by default below ~/.cache, where all nodes see it.
    """
    if what == "none":
        return None
    _choose_cache()
    for verb in _VERBS:
        setattr(module.comm, verb, torch.compiler.disable(getattr(module.comm, verb)))
    for part in module.interventions.values():
        for hook in _HOOKS:
            if getattr(type(part), hook) is not getattr(Intervention, hook):
                setattr(part, hook, _compiled(getattr(part, hook)))
    if what == "all":
        module.detector.extract = _compiled(module.detector.extract)
        module.detector.classify = _compiled(module.detector.classify)
    compiled = "the objectives" if what == "objectives" else "detector and objectives"
    return (f"train.compile={what}: {compiled} are compiled in the first step, a minute or more; later runs find them "
            f"in {os.environ[_CACHE]}")  # fmt: skip


def _choose_cache() -> None:
    """Torch's own choice is a folder of /tmp, which batch systems empty after each job; a user's stays."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(_CACHE) in (None, "", default_cache_dir()):
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ[_CACHE] = str(root / "dist_fair" / "compiled")


def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)
