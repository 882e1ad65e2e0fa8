"""The one gradient rule, and everything else that crosses the wire, on W = 1, 2, 3, 4 real ranks in fp64."""

import pytest
import torch

from dist_fair import collectives
from dist_fair.collectives import Communicator
from dist_fair.errors import DistFairError
from tests.ranks import run_ranks

SIZES = {1: (6,), 2: (5, 2), 3: (4, 0, 3), 4: (1, 3, 0, 4)}  # rows per rank, uneven, some without any
WORLDS = sorted(SIZES)
VERBS = ("replicated_sum", "replicated_gather", "shared_sum")


def model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 2).double(), torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))


def rows_of(comm, sizes):
    torch.manual_seed(1)
    start = sum(sizes[: comm.rank])
    return torch.randn(sum(sizes), 3, dtype=torch.float64)[start : start + sizes[comm.rank]]


def objective(comm, verb, features, temperature, sizes):
    """A loss that couples all rows, with a parameter (the temperature) behind the collective."""
    total = sum(sizes)
    if verb == "replicated_sum":
        moments = comm.replicated_sum(torch.cat([features.sum(0), features.square().sum(0)]), "test")
        return (moments / total * temperature).exp().sum()
    if verb == "replicated_gather":
        everyone = comm.replicated_gather(features, "test", sizes)
        order = torch.linspace(-1, 1, total, dtype=torch.float64)  # canonical order matters
        return (order @ torch.softmax(everyone @ everyone.T * temperature, dim=1)).square().sum()
    mean = comm.shared_sum(features.sum(0), "test") / total
    own = ((features - mean) * temperature).pow(3).sum(0)
    return comm.replicated_sum(own, "test/loss").square().sum()


def gradients(comm, verb, sizes, plant=None):
    """Loss, gradients as DDP averages them, and the gradient at this rank's rows divided by W."""
    if plant:
        PLANTS[plant]()
    linear, temperature = model()
    rows = rows_of(comm, sizes).requires_grad_()
    loss = objective(comm, verb, linear(rows), temperature, sizes)
    loss.backward()
    parameters = [*linear.parameters(), temperature]
    return loss.detach(), [comm.sum(p.grad, "ddp") / comm.world for p in parameters], rows.grad / comm.world


def agrees(ranks, expected):
    def close(actual, wanted):
        return torch.allclose(actual, wanted, rtol=1e-10, atol=1e-12)

    loss, parameters, rows = expected
    return all(close(rank[0], loss) and all(map(close, rank[1], parameters)) for rank in ranks) and close(
        torch.cat([rank[2] for rank in ranks]), rows
    )


def gradients_of_each(comm, sizes):
    return {verb: gradients(comm, verb, sizes) for verb in VERBS}


@pytest.mark.parametrize("world", WORLDS)
def test_the_gradient_rule(world):
    sizes = SIZES[world]
    ranks = run_ranks(world, gradients_of_each, sizes)
    for verb in VERBS:
        expected = gradients(Communicator(), verb, (sum(sizes),))
        assert agrees([rank[verb] for rank in ranks], expected), verb


def no_factor_in_sum():
    """lightly #1977: a raw all-reduce in a loss; the gradient is 1/W of the true one."""
    collectives._ReplicatedSum.backward = staticmethod(lambda ctx, gradient: (gradient, None, None))


def no_factor_in_gather():
    """open_clip's default: plain gather and own slot."""
    backward = collectives._ReplicatedGather.backward
    collectives._ReplicatedGather.backward = staticmethod(
        lambda ctx, gradient: (backward(ctx, gradient)[0] / ctx.world, None, None, None)
    )


def factor_on_the_loss():
    """loss * W: right for the backbone, W times too large for the temperature."""
    no_factor_in_sum()
    plain = objective

    def multiplied(comm, *rest):
        return plain(comm, *rest) * comm.world

    globals()["objective"] = multiplied


def detached_sum():
    """torch.distributed.all_reduce under autograd: what came from other ranks, and here, is a constant."""
    collectives._SharedSum.backward = staticmethod(lambda ctx, gradient: (torch.zeros_like(gradient), None, None))


def local_backward_of_shared():
    """No all-reduce in the backward of a shared sum."""
    collectives._SharedSum.backward = staticmethod(lambda ctx, gradient: (gradient, None, None))


def factor_in_shared():
    """The factor W in a shared sum, whose incoming gradients carry it already."""
    backward = collectives._SharedSum.backward
    collectives._SharedSum.backward = staticmethod(
        lambda ctx, gradient: (backward(ctx, gradient)[0] * ctx.comm.world, None, None)
    )


def rank_first_order():
    """pytorch-metric-learning #639: each rank puts its own rows first."""
    gather = Communicator._gather

    def own_first(self, rows, name, sizes):
        everyone = gather(self, rows, name, sizes)
        start = sum(sizes[: self.rank])
        return torch.cat([rows, everyone[:start], everyone[start + len(rows) :]])

    Communicator._gather = own_first


def wrong_rows_in_gather():
    """Own rows located by rank * n, which uneven ranks break."""
    forward = collectives._ReplicatedGather.forward

    def even(ctx, rows, comm, name, sizes):
        everyone = forward(ctx, rows, comm, name, sizes)
        ctx.start = min(comm.rank * len(rows), len(everyone) - len(rows))
        ctx.stop = ctx.start + len(rows)
        return everyone

    collectives._ReplicatedGather.forward = staticmethod(even)


PLANTS = {
    "no_factor_in_sum": no_factor_in_sum,
    "no_factor_in_gather": no_factor_in_gather,
    "factor_on_the_loss": factor_on_the_loss,
    "detached_sum": detached_sum,
    "local_backward_of_shared": local_backward_of_shared,
    "factor_in_shared": factor_in_shared,
    "rank_first_order": rank_first_order,
    "wrong_rows_in_gather": wrong_rows_in_gather,
}


@pytest.mark.parametrize(
    ("plant", "verb"),
    [
        ("no_factor_in_sum", "replicated_sum"),
        ("factor_on_the_loss", "replicated_sum"),
        ("no_factor_in_gather", "replicated_gather"),
        ("rank_first_order", "replicated_gather"),
        ("wrong_rows_in_gather", "replicated_gather"),
        ("detached_sum", "shared_sum"),
        ("local_backward_of_shared", "shared_sum"),
        ("factor_in_shared", "shared_sum"),
    ],
)
def test_planted_bugs_are_found(plant, verb):
    sizes = SIZES[2]
    expected = gradients(Communicator(), verb, (sum(sizes),))
    assert not agrees(run_ranks(2, gradients, verb, sizes, plant), expected)


def without_gradient(comm, sizes):
    """Every verb that has no gradient, on one set of ranks."""
    rows = rows_of(comm, sizes).requires_grad_()
    summed = comm.sum(rows.sum(0), "sum")
    maximum = comm.maximum(torch.tensor([comm.rank, -comm.rank]), "maximum")
    gathered = comm.gather(rows, "gather", sizes)
    columns = torch.arange(sum(sizes) * 12.0).view(-1, 12, 1)
    start = sum(sizes[: comm.rank])
    exchanged = comm.exchange_columns(columns[start : start + len(rows)], "exchange", sizes)
    assert not summed.requires_grad
    assert not gathered.requires_grad
    comm.barrier("barrier")
    return {
        "sum": summed,
        "maximum": maximum.tolist(),
        "gather": gathered,
        "exchange": exchanged,
        "any": [comm.any(comm.rank == 0, "any"), comm.any(False, "any")],
        "objects": comm.objects({"rank": comm.rank, "text": "\u00e9" * comm.rank}, "objects"),
        "counts": {name: (count.calls, count.bytes) for name, count in comm.drain().items()},
        "left": dict(comm.drain()),
        "last": comm.last,
    }


@pytest.mark.parametrize("world", WORLDS)
def test_verbs_without_gradient(world):
    sizes = SIZES[world]
    whole = rows_of(Communicator(), (sum(sizes),))
    columns = torch.arange(sum(sizes) * 12.0).view(-1, 12, 1)
    width = 12 // world
    for rank, result in enumerate(run_ranks(world, without_gradient, sizes)):
        torch.testing.assert_close(result["sum"], whole.sum(0), rtol=1e-12, atol=1e-12)
        assert result["maximum"] == [world - 1, 0]
        assert torch.equal(result["gather"], whole)
        assert torch.equal(result["exchange"], columns[:, rank * width : (rank + 1) * width])
        assert result["any"] == [True, False]
        assert result["objects"] == [{"rank": r, "text": "\u00e9" * r} for r in range(world)]
        assert result["counts"]["sum"] == (1, 3 * 8)
        assert result["counts"]["gather"] == (1, sizes[rank] * 3 * 8)
        assert result["counts"]["exchange"] == (1, sizes[rank] * 12 * 4)
        assert result["counts"]["any"] == (2, 2 * 8)
        assert result["left"] == {}
        assert result["last"] == "objects"


def exchange_by_gather(comm):
    collectives._has_all_to_all = lambda group: False
    rows = torch.arange(8.0).view(2, 4) + 100 * comm.rank
    return comm.exchange_columns(rows, "exchange")


def test_exchange_without_all_to_all():
    ranks = run_ranks(2, exchange_by_gather)
    whole = torch.cat([torch.arange(8.0).view(2, 4), torch.arange(8.0).view(2, 4) + 100])
    assert torch.equal(ranks[0], whole[:, :2])
    assert torch.equal(ranks[1], whole[:, 2:])


def agree_on(comm, values):
    comm.agree(values[comm.rank], "mask")
    return "agreed"


def test_agree():
    assert run_ranks(3, agree_on, [b"0123456789abcdef"] * 3) == ["agreed"] * 3
    with pytest.raises(DistFairError, match=r"mask: ranks \[2\] disagree"):
        run_ranks(3, agree_on, [b"0123456789abcdef"] * 2 + [b"0123456789abcdeF"])


def objects_fail_safely(comm):
    return comm.objects([], "empty"), comm.objects(None, "none")


def test_objects_of_any_size():
    assert run_ranks(2, objects_fail_safely) == [([[], []], [None, None])] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    comm = Communicator()
    for verb in (comm.replicated_sum, comm.replicated_gather, comm.shared_sum, comm.sum, comm.maximum, comm.gather):
        with pytest.raises(TypeError, match=f"'moments' got {dtype}"):
            verb(torch.ones(2, dtype=dtype), "moments")


def test_wrong_sizes_are_errors():
    comm = Communicator()
    with pytest.raises(ValueError, match="has 2 rows, the plan says"):
        comm.replicated_gather(torch.ones(2), "test", [3])
    comm.world, comm.rank = 2, 0
    with pytest.raises(ValueError, match="3 columns do not split over 2 ranks"):
        comm.exchange_columns(torch.ones(2, 3), "test")


def test_one_rank_counts_like_many():
    comm = Communicator()
    rows = torch.ones(2, 3)
    assert comm.replicated_sum(rows, "a").data_ptr() != rows.data_ptr()
    comm.shared_sum(rows.requires_grad_(), "b").sum().backward()
    counts = comm.drain()
    assert [(name, count.calls, count.bytes) for name, count in counts.items()] == [
        ("a", 1, 24),
        ("b", 1, 24),
        ("b/backward", 1, 24),
    ]
