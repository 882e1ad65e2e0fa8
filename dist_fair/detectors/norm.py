"""Batch norm whose batch is the global one.

A batch norm couples every sample of a batch with every other one. Split the batch over W ranks and nn.BatchNorm quietly
becomes W norms with statistics of B/W samples each: other outputs, other gradients, other running statistics on every
rank. Here the statistics are those of the global batch, on any W, on CPU and GPU, forward and backward.

On one rank the global batch is the local one, and torch's own batch norm is this norm: it runs, and nothing else does.
On several:

               local, by torch's own kernels                    on the wire (one all-reduce each, fp64)
    forward    n_r, mean_r, var_r (biased) per channel      ->  (n mean, n (var + mean^2), n), additive: 2C + 1 numbers
               y = weight xhat + bias, xhat = (x - mean) / sqrt(var + eps)
    backward   S1_r = sum dy, S2_r = sum dy xhat            ->  (S1, S2): 2C numbers
               dx = weight / sqrt(var + eps) (dy - S1/N - xhat S2/N)
               dbias = S1_r, dweight = S2_r, local sums like every parameter gradient

Nothing here knows W. The statistics are a `shared` sum (see dist_fair.collectives): each rank normalises its own rows
with them, so their gradient is all-reduced, without a factor. What comes in, dy, carries W by the one gradient rule, so
S1, S2 and dx carry it, as they must; dweight and dbias are W times this rank's part of the true gradient, and the
average over ranks makes the sum of the parts. N is the global number of values per channel: ranks may hold different
numbers of rows, or none, as long as they all call.

The moments are combined in fp64. var = E[x^2] - mean^2 then loses 1e-16 mean^2 / var: nothing at mean 1e4 and std 1,
where the same sum in fp32 has no correct digit. The local moments come from two-pass or Welford kernels, in fp32 for
fp32 input.

The local kernels are those of native_batch_norm, or on a GPU those of SyncBatchNorm (see dist_fair.detectors.
norm_kernels), whose S2 is sum dy (x - mean): the same but for a factor. torch.nn.SyncBatchNorm itself gathers the
moments of all ranks, 2C + 1 numbers from each; what a rank receives then grows with W, and here it does not. A layer on
a GPU launches 20 kernels forward, 7 of them for the running statistics, and 7 backward, the copy for the wire included.
"""

from functools import wraps

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dist_fair.collectives import Communicator
from dist_fair.detectors import norm_kernels
from dist_fair.errors import DistFairError, nearest

MODES = ("synced", "local", "frozen")


def convert_norms(module: nn.Module, mode: str, comm: Communicator) -> nn.Module:
    """Replaces the batch norms in `module`, in place; returns it (or its replacement, if it is a batch norm itself).

    mode: "synced", statistics of the global batch; "local", left as they are, statistics per rank; "frozen", the
    running statistics normalise in training too and never change, weight and bias still train. Names of parameters and
    buffers stay. Norms without batch statistics (layer, group, instance norm, torchvision's frozen ones) stay too.
    Raises DistFairError on an unknown mode, and on a layer with batch statistics of a kind that cannot be converted.
    """
    if mode not in MODES:
        raise DistFairError(f"detector.norm={mode}: {nearest(mode, list(MODES))}")
    if mode == "local":
        return module
    kinds, replacements = _convertible(), {}
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if type(layer) in kinds:
            if layer not in replacements:
                replacements[layer] = SyncedBatchNorm(layer, comm) if mode == "synced" else FrozenBatchNorm(layer)
            if layer is not module:
                module.set_submodule(name, replacements[layer])
        elif _has_batch_statistics(layer):
            kind = f"{type(layer).__module__}.{type(layer).__name__}"
            raise DistFairError(
                f"detector.norm={mode}: layer '{name}' ({kind}) has batch statistics of its own and cannot be "
                f"converted; use a backbone with nn.BatchNorm, or detector.norm=local"
            )
    return replacements.get(module, module)


class _Replacement(_BatchNorm):
    """Takes over the parameters, buffers and children of a batch norm. Children (timm's drop, act) follow the norm."""

    def __init__(self, norm: _BatchNorm):
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
        self.affine, self.track_running_stats = norm.affine, norm.track_running_stats
        self._parameters.update(norm._parameters)
        self._buffers.update(norm._buffers)
        self._modules.update(norm._modules)
        self.train(norm.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.normalise(x)
        for child in self.children():
            y = child(y)
        return y

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class FrozenBatchNorm(_Replacement):
    """Batch norm with fixed statistics, in training too. Weight and bias train."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


def untraced(function):
    """torch.compiler.disable, for a compiler that is imported, which takes 2 s, when the function is first called."""

    @wraps(function)
    def call(*arguments):
        if not hasattr(function, "untraced"):
            function.untraced = torch.compiler.disable(function)
        return function.untraced(*arguments)

    return call


class SyncedBatchNorm(_Replacement):
    """Batch norm over the global batch: nn.BatchNorm1d/2d/3d, timm's BatchNormAct2d. (B, C, ...) -> (B, C, ...).

    Running variance is unbiased with the global N, as in torch; running statistics are the same on all ranks. They
    stay as they are while `track_running_stats` is False, as torch's do. Where a channel has one value in all, which
    torch refuses, it comes out as the bias.
    """

    def __init__(self, norm: _BatchNorm, comm: Communicator):
        super().__init__(norm)
        self.comm = comm

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and self.running_mean is not None:
            return super().normalise(x)
        if self.comm.world == 1 and x.numel() > x.shape[1]:
            return _BatchNorm.forward(self, x)
        return self._normalise_together(x)

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """nn.BatchNorm's forward asks; any (B, C, ...) will do."""

    @untraced
    def _normalise_together(self, x: torch.Tensor) -> torch.Tensor:
        y, moments, count = _Normalise.apply(x, self.weight, self.bias, self.eps, self.comm)
        if self.training and self.track_running_stats:
            self._track(*moments, count)
        return y

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> None:
        dtype = self.running_mean.dtype
        self.num_batches_tracked += 1
        momentum = (1 / self.num_batches_tracked.double()).to(dtype) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(dtype), momentum)
        self.running_var.lerp_((variance * unbiasing(count)).to(dtype), momentum)


class _Normalise(torch.autograd.Function):
    """x (B, C, ...) -> y, and the moments (2, C) and global N () that it was normalised by, without a gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps: float, comm: Communicator):
        x = norm_kernels.dense(x) if norm_kernels.serve(x) else x
        moments, count = global_moments(x, comm)
        mean, variance = moments
        invstd = torch.rsqrt(variance + eps)
        ctx.eps, ctx.comm = eps, comm
        ctx.parameter_types = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
        weight, bias = (None if one is None else one.to(mean.dtype) for one in (weight, bias))
        ctx.save_for_backward(x, weight, moments, invstd, count)
        ctx.mark_non_differentiable(moments, count)
        ctx.set_materialize_grads(False)  # or zeros are made for them in backward
        if norm_kernels.serve(x) and x.numel():
            return norm_kernels.normalised(x, mean, invstd, weight, bias, eps), moments, count
        return affine(x, mean, variance, weight, bias, eps), moments, count

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, weight, moments, invstd, count = ctx.saved_tensors
        backward = gpu_backward if norm_kernels.serve(x) and x.numel() else native_backward
        dx, dweight, dbias = backward(dy, x, weight, *moments, invstd, count, ctx.eps, ctx.comm)
        weight_type, bias_type = ctx.parameter_types
        dweight = None if weight_type is None else dweight.to(weight_type)
        dbias = None if bias_type is None else dbias.to(bias_type)
        return dx, dweight, dbias, None, None


# The wire -------------------------------------------------------------------------------------------------------------


def global_moments(x: torch.Tensor, comm: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (2, C), fp32 or fp64, and the number of values per channel () fp64, over all ranks."""
    mean, variance = local_moments(x)
    channels = len(mean)
    wire = mean.new_full((2 * channels + 1,), x.numel() / channels, dtype=torch.float64)
    sums, squares = wire[:channels], wire[channels:-1]
    sums.mul_(mean)
    squares.mul_(variance).addcmul_(sums, mean)
    total = comm.sum(wire, "norm/forward")
    moments, count = (total[:-1] / total[-1]).view(2, channels), total[-1]
    moments[1].addcmul_(moments[0], moments[0], value=-1).clamp_(min=0)
    return moments.to(mean.dtype), count


def global_means(s1, s2, count, comm: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
    """S1/N and S2/N (C,), of the global sums, from this rank's S1 and S2 (C,)."""
    total = comm.sum(torch.cat([s1, s2]).double(), "norm/backward")
    return (total / count).to(s1.dtype).chunk(2)


# The local part -------------------------------------------------------------------------------------------------------


def local_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (C,) of this rank's x, fp32 or fp64; zeros without rows."""
    if x.numel() and norm_kernels.serve(x):
        return norm_kernels.moments(x)
    mean, variance = torch.zeros(2, x.shape[1], dtype=_statistics_type(x), device=x.device)
    # As scratch running statistics they make the kernel return fp32 for half-precision input.
    return torch.batch_norm_update_stats(x, mean, variance, 0.0) if x.numel() else (mean, variance)


def gpu_backward(dy, x, weight, mean, variance, invstd, count, eps: float, comm: Communicator):
    """dx (B, C, ...), this rank's dweight (None without a weight) and dbias (C,), by the kernels of SyncBatchNorm."""
    dy = norm_kernels.dense(dy, like=x)
    s1, s2, dweight = norm_kernels.sums(dy, x, mean, invstd, weight)
    mean1, mean2 = global_means(s1, s2, count, comm)
    return norm_kernels.input_gradient(dy, x, mean, invstd, weight, mean1, mean2), dweight, s1


def native_backward(dy, x, weight, mean, variance, invstd, count, eps: float, comm: Communicator):
    """The same by those of native_batch_norm, which every device has."""
    scale = torch.ones_like(mean) if weight is None else weight
    dx, s1, s2 = local_backward(dy, x, scale, mean, variance, invstd, eps)
    return add_statistics_gradient(dx, s1, s2, x, scale, mean, variance, invstd, count, eps, comm), s2, s1


def local_backward(dy, x, scale, mean, variance, invstd, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx with the statistics held fixed (B, C, ...), and this rank's S1 = sum dy and S2 = sum dy xhat (C,)."""
    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(mean), torch.zeros_like(mean)
    # A CPU reads the statistics where it does not train from the running ones. CUDA does, too, if x is contiguous; if
    # it is channels_last, it takes the saved ones, and ends the program where there are none.
    dx, s2, s1 = torch.ops.aten.native_batch_norm_backward(
        dy, x, scale, mean, variance, mean, invstd, False, eps, [True, True, True]
    )
    return dx, s1, s2


def add_statistics_gradient(dx, s1, s2, x, scale, mean, variance, invstd, count, eps: float, comm: Communicator):
    """Adds to dx what comes through mean and variance: -scale / sqrt(var + eps) (S1/N + xhat S2/N)."""
    mean1, mean2 = global_means(s1, s2, count, comm)
    factor = -scale * invstd
    # That is an affine function of xhat: the forward kernel does it in one pass.
    return dx.add_(affine(x, mean, variance, factor * mean2, factor * mean1, eps))


def affine(x, mean, variance, scale, shift, eps: float) -> torch.Tensor:
    """scale (x - mean) / sqrt(variance + eps) + shift, in x's type and memory format. scale, shift: (C,) or None."""
    return F.batch_norm(x, mean, variance, scale, shift, False, 0.0, eps) if x.numel() else x.clone()


def unbiasing(count: torch.Tensor) -> torch.Tensor:
    """N / (N - 1), the step from biased to unbiased variance; 1 where N is 1."""
    return count / (count - 1).clamp(min=1)


def _statistics_type(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _convertible() -> set[type[nn.Module]]:
    from timm.layers import BatchNormAct2d

    return {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d}


def _has_batch_statistics(layer: nn.Module) -> bool:
    from timm.layers import FrozenBatchNormAct2d
    from torchvision.ops import FrozenBatchNorm2d

    if isinstance(layer, (_Replacement, FrozenBatchNorm2d, FrozenBatchNormAct2d)):
        return False
    return isinstance(layer, _BatchNorm) or layer._buffers.get("running_var") is not None
