"""How exactness is asserted: splits, real ranks, a comparison to 1e-10, and what bugs have patched put back."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from dist_fair import collectives
from dist_fair.collectives import Communicator
from tests.ranks import run_ranks

SPLITS = [(17,), (9, 8), (0, 17), (1, 1, 15), (5, 0, 4, 8), (0, 3, 0, 13, 1)]
SIZES = {1: (17,), 2: (9, 8), 3: (12, 0, 5), 4: (1, 7, 3, 6)}  # rows of each rank, by the number of ranks
UNEVEN = (1, 7, 9)  # for planted bugs


def value_and_gradient(function, inputs):
    """The scalar that a function gives and its gradient with respect to the inputs."""
    inputs = inputs.clone().requires_grad_()
    value = function(inputs)
    value.backward()
    return value.detach(), inputs.grad


def value_and_gradients(value, model):
    """A scalar and the gradient of every parameter of a model, zeros where there is none."""
    value.backward()
    return value.item(), {name: _gradient(parameter) for name, parameter in model.named_parameters()}


def averaged(parameters, comm):
    """Gradients, name -> tensor, of named parameters as DDP averages them over ranks."""
    gradients = {name: _gradient(parameter) for name, parameter in parameters}
    if comm.world > 1:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
    return {name: gradient / comm.world for name, gradient in gradients.items()}


def calls(comm):
    """Calls and bytes of each named collective since the last time."""
    return {name: (count.calls, count.bytes) for name, count in comm.drain().items()}


def _gradient(parameter):
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def compare_gradients(found, expected):
    """Those of `averaged` against those of `value_and_gradients`."""
    assert list(found) == list(expected)
    for name, one in found.items():
        torch.testing.assert_close(one, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def on_ranks(step, cases, sizes, bug=None):
    """(case, what each rank's step(comm, *case, sizes, bug) gave) for each case; all in one set of processes."""
    answers = run_ranks(len(sizes), _each, step, cases, sizes, bug)
    return [(case, [answer[number] for answer in answers]) for number, case in enumerate(cases)]


def _each(comm, step, cases, sizes, bug):
    return [step(comm, *case, sizes, bug) for case in cases]


def caught(compare, answers, case):
    """The comparison, which must fail."""
    with pytest.raises(AssertionError):
        compare(answers, *case)


WIRE = [(Communicator, name) for name in ("replicated_sum", "replicated_gather", "shared_sum", "_gather")]
WIRE += [(kind, "backward") for kind in (collectives._ReplicatedSum, collectives._ReplicatedGather)]
WIRE += [(collectives._SharedSum, "backward")]


@contextmanager
def restored(*places):
    """Puts back what a bug replaces, in the collectives and at further places (owner, name): some undo themselves if
    they are planted twice."""
    kept = [(owner, name, vars(owner)[name]) for owner, name in (*WIRE, *places)]
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


class Watched(TorchDispatchMode):
    """Notes the operations of torch that run: `seen`, by name."""

    WAITS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount", "item",
                       "equal"})  # fmt: skip

    def __init__(self):
        super().__init__()
        self.seen = set()

    @property
    def waits(self):
        """Those among them that make the host wait for a GPU."""
        return self.seen & self.WAITS

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.seen.add(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))
