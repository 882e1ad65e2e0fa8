"""What an intervention costs a GPU besides arithmetic, seen on a CPU: kernels to launch, and waits of the host.

At the size of an objective a kernel takes less time than its launch, so what counts is their number. And the host runs
ahead of the device: whoever asks for a number that lies there, or for a shape that depends on numbers, stops both.

Every operation that torch dispatches, in forward and backward, is one kernel here, unless it only makes a view or takes
memory. (On a GPU a few are more than one: a sort of up to 4,096 numbers is three.) An operation that waits is known by
its name or its indices; and on `meta`, a device without numbers, whatever would fetch one, or bring one from the host's
memory, raises an error.
"""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_fair.collectives import Communicator
from dist_fair.data.batch import Batch
from dist_fair.data.index import Column
from dist_fair.detectors.base import Outputs
from dist_fair.interventions.base import Facts, exchange, registered

ROWS, WIDTH, SIDE = 64, 2048, 8
VOCABULARY = {"gender": ("female", "male"), "race": ("Asian", "Black", "Other", "White")}
MANIPULATIONS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")

# Without a kernel, beside views.
MEMORY = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "squeeze_",
                    "_unsafe_view", "_reshape_alias", "lift_fresh", "promote_types"})  # fmt: skip
# `lift_fresh` is torch.tensor(...), or an index that is a list: numbers from the host's memory, which is not pinned.
WAITS = frozenset({"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select",
                   "unique_dim", "_unique", "_unique2", "unique_consecutive", "bincount", "_linalg_check_errors",
                   "lift_fresh"})  # fmt: skip
INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
# Add in another order each time on a GPU, or raise an error under torch.use_deterministic_algorithms.
UNORDERED = frozenset({"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "index_reduce",
                       "index_copy", "put_", "_embedding_bag", "embedding_dense_backward", "nll_loss2d_forward",
                       "histc", "kthvalue", "median"})  # fmt: skip


class Launches(TorchDispatchMode):
    """Within it: `kernels`, how often each operation that launches one ran, and `waits`, those the host waits in.

    unordered: those whose result is another each time.
    """

    def __init__(self):
        super().__init__()
        self.kernels, self.waits, self.unordered = Counter(), [], []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name, result = function.overloadpacket.__name__, function(*arguments, **(keywords or {}))
        if name in WAITS or (name in INDEXING and _has_bools(arguments[1])) or _counts_repeats(name, keywords or {}):
            self.waits.append(name)
        if name in UNORDERED or (name in ("cumsum", "cumsum_") and result.is_floating_point()):
            self.unordered.append(name)
        if name not in MEMORY and not function.is_view:
            self.kernels[name] += 1
        return result


def _has_bools(indices):
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _counts_repeats(name, keywords):
    return name == "repeat_interleave" and keywords.get("output_size") is None


# What the loader and a detector give ----------------------------------------------------------------------------------


def facts():
    """Training data that have every group and manipulation, and unknown ones."""
    random, size = np.random.default_rng(7), 400
    labels = np.arange(size, dtype=np.int8) % 2
    columns = {name: Column(values, random.integers(-1, len(values), size, dtype=np.int32))
               for name, values in VOCABULARY.items()}  # fmt: skip
    codes = np.where(labels == 1, random.integers(-1, len(MANIPULATIONS), size), -1).astype(np.int32)
    index = SimpleNamespace(attributes=columns, labels=labels, manipulations=Column(MANIPULATIONS, codes))
    return Facts(index, np.full(size, 1 / size), seed=5, steps=100, channels=WIDTH, paired=True)


def build(name, settings):
    kind = registered()[name]
    torch.manual_seed(1)
    return kind(kind.Settings(**settings), facts(), WIDTH)


def loaded():
    """A batch with the types and strides of the loader's, half of it fakes; its images as a detector takes them."""
    random = torch.Generator().manual_seed(3)
    columns = torch.randint(2**62, (6, ROWS), generator=random)
    columns[0] = torch.arange(ROWS) // 2 % 2
    columns[1] = torch.where(columns[0] == 1, columns[1] % (len(MANIPULATIONS) + 1) - 1, -1)
    for row, values in zip((4, 5), VOCABULARY.values(), strict=True):
        columns[row] = columns[row] % (len(values) + 1) - 1
    labels, manipulations, samples, keys, gender, race = columns.unbind()
    return Batch(
        images=torch.rand(ROWS, SIDE, SIDE, 3, generator=random).permute(0, 3, 1, 2),
        labels=labels,
        attributes={"gender": gender, "race": race},
        manipulations=manipulations,
        samples=samples,
        valid=torch.ones(ROWS, dtype=torch.bool),
        keys=keys,
        sizes=(ROWS,),
        position=0,
    )


def detected(device="cpu"):
    """What a detector gives, in fp32; each of its tensors is a leaf of the graph."""
    random = torch.Generator().manual_seed(4)

    def made(*shape):
        return torch.randn(ROWS, *shape, generator=random).to(device).requires_grad_()

    logits, features = made(2), made(WIDTH)
    extras = {"shared_logits": made(2), "specific_logits": made(1 + len(MANIPULATIONS)), "demographic_logits": made(8)}
    extras |= {"shared": made(256), "specific": made(256), "code": made(3, SIDE, SIDE), "condition": made(1)}
    return Outputs(logits, features, features, extras, lambda code, condition, keys: code)


def gradients(outputs):
    """Name -> gradient of what `detected` gave; None where none came."""
    leaves = {"logits": outputs.logits, "features": outputs.features, **outputs.extras}
    return {name: leaf.grad for name, leaf in leaves.items()}


# A step ---------------------------------------------------------------------------------------------------------------


def run(intervention, batch, outputs, comm=None):
    """All that the intervention does in a step of training, forward and backward; its terms and measures."""
    comm, kind = comm or Communicator(), type(intervention)
    if "transform" in vars(kind):
        features = intervention.transform(outputs.features, batch, comm)
        features.backward(torch.linspace(-1, 1, features.numel(), device=features.device).cos_().view_as(features))
    if "weigh" in vars(kind):
        intervention.weigh(batch)
    summary, found = {}, {}
    if "summarise" in vars(kind):
        summary = intervention.summarise(outputs, batch, outputs.logits.new_ones(len(batch)))
    if "objective" in vars(kind):
        found = intervention.objective(exchange({"it": summary}, comm, batch.sizes)["it"])
        found[kind.terms[0]].backward()
    return found


def counted(intervention, batch, outputs):
    """What `Launches` sees of `run`, without the weights and the gradients that it begins with."""
    with Launches() as launches:
        run(intervention, batch, outputs)
    begins = {"transform": ("linspace", "cos_"), "objective": ("ones_like",), "summarise": ("new_ones",)}
    for hook in begins.keys() & vars(type(intervention)).keys():
        launches.kernels.subtract(begins[hook])
    return launches
