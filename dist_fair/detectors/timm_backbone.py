"""Any timm model as a detector: its last feature map, a channel mask, global average pooling, a linear classifier.

The feature map is what the model's forward_features returns, after its last norm and activation. Heads that convolve
after pooling (MobileNetV3's conv_head) or normalise after pooling (ConvNeXt) belong to timm's classifier and are
removed: every parameter of a detector takes part in its loss, as DDP requires. EfficientNet keeps timm's stem;
DeepfakeBench's replaces it and throws away the pretrained one.
"""

import math
import os
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from dist_fair.detectors.base import Detector, Outputs, keep_outputs
from dist_fair.detectors.weights import SUFFIXES, load_weights
from dist_fair.errors import DistFairError, nearest

_OURS = ("num_classes", "global_pool", "in_chans", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path")
_CLASSIFIERS = ("fc", "classifier", "head", "last_linear")  # what timm, torchvision and Cadene call theirs
_PROBE = 128  # pixels; enough for every stem (Xception needs 71)


class TimmDetector(Detector):
    """images (B, 3, H, W) -> feature_map (B, C, h, w), features (B, C), logits (B, 2). Features and logits in fp32+.

    adjust_channels: width of a 1x1 convolution + batch norm + ReLU after the backbone, C then (512 on Xception's 2048
    in PG-FDD and UCF; absent in SFD+GDA). smooth: see `smoothed`. pixel_mean, pixel_std: what timm's weights of this
    model expect.
    """

    def __init__(self, backbone: nn.Module, channels: int, adjust_channels: int | None = None):
        width = adjust_channels or channels
        super().__init__(width, width)
        self.backbone = backbone
        self.adjust = adjustment(backbone, channels, width) if adjust_channels else nn.Identity()
        self.classifier = nn.Linear(width, 2)
        self.pixel_mean = tuple(backbone.pretrained_cfg.get("mean", (0.5, 0.5, 0.5)))
        self.pixel_std = tuple(backbone.pretrained_cfg.get("std", (0.5, 0.5, 0.5)))

    def extract(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> Outputs:
        images = images.to(self.classifier.weight.dtype)
        feature_map = self.unmasked(self.adjust(last_map(self.backbone, images)))
        features = feature_map.mean(dim=(2, 3), dtype=full_precision(feature_map))
        return Outputs(features.new_empty((len(features), 0)), features, feature_map)

    def classify(self, features: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.classifier(features)
        return logits.to(full_precision(logits))

    def resize_classifier(self, features: int) -> None:
        weight = self.classifier.weight
        self.classifier = nn.Linear(features, 2, device=weight.device, dtype=weight.dtype)

    def features_layer(self) -> nn.Linear:
        return self.classifier

    def narrow(self, kept: torch.Tensor) -> bool:
        # A backbone's own last map is mostly the sum of a block and its shortcut; group norm reads all channels.
        if isinstance(self.adjust, nn.Identity) or isinstance(self.adjust[1], nn.GroupNorm):
            return False
        for layer in self.adjust[:2]:
            keep_outputs(layer, kept)
        return True


def adjustment(backbone: nn.Module, channels: int, width: int) -> nn.Sequential:
    """1x1 convolution + norm + ReLU, (B, channels, h, w) -> (B, width, h, w).

    Batch norm as in the papers; group norm after a backbone without batch norm, so that it still has no statistics of
    the batch.
    """
    batched = any(isinstance(layer, _BatchNorm) for layer in backbone.modules())
    norm = nn.BatchNorm2d(width) if batched else nn.GroupNorm(math.gcd(32, width), width)
    return nn.Sequential(nn.Conv2d(channels, width, 1), norm, nn.ReLU())


def build_timm(
    name: str, pretrained: bool | str, arguments: Mapping[str, object], others: Iterable[str]
) -> TimmDetector:
    """A TimmDetector by timm's model name. others: further names to suggest when there is no such model."""
    arguments, smooth = backbone_arguments(arguments, pretrained)
    adjust_channels = arguments.pop("adjust_channels", None)
    if adjust_channels is not None and not (type(adjust_channels) is int and adjust_channels > 0):
        raise DistFairError(f"detector.arguments.adjust_channels={adjust_channels}: a number of channels, or left out")
    backbone, channels = create_backbone(name, pretrained, arguments, others)
    return TimmDetector(smoothed(backbone) if smooth else backbone, channels, adjust_channels)


def backbone_arguments(arguments: Mapping[str, object], pretrained: bool | str) -> tuple[dict[str, object], bool]:
    """detector.arguments without `smooth`, and whether to smooth. Raises DistFairError for what is not for users."""
    arguments = dict(arguments)
    ours = [key for key in _OURS if key in arguments]
    if ours:
        raise DistFairError(f"detector.arguments.{ours[0]}: set by dist_fair; leave it out")
    smooth = arguments.pop("smooth", False)
    if smooth not in (True, False) or (smooth and pretrained):
        raise DistFairError(
            f"detector.arguments.smooth={smooth} with detector.pretrained={pretrained}: true or false, and true only "
            "from scratch: weights that were learned with ReLU mean nothing without it"
        )
    return arguments, smooth


def smoothed(module: nn.Module) -> nn.Module:
    """The module, in place, with SiLU for every (leaky) ReLU and SoftPool for every max pool: no kinks.

    At a kink, rounding decides which way the gradient goes. In fp32, one ReLU flipped in the last block of the demo's
    detector moved the gradient by 0.5 %, one max pool flipped moved that of the stem by 1 %; such a flip came every ten
    steps, and runs on different numbers of ranks part ways from there on (not in fp64). Without kinks they do not.
    """
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.ReLU | nn.LeakyReLU):
            module.set_submodule(name, nn.SiLU(inplace=layer.inplace))
        elif isinstance(layer, nn.MaxPool2d):
            module.set_submodule(name, SoftPool2d(layer.kernel_size, layer.stride, layer.padding))
    return module


class SoftPool2d(nn.Module):
    """The mean of each window, weighted by exp(x): a max pool without kinks (Stergiou et al. 2021). (B, C, H, W).

    A plain average blurs what forgeries leave behind: the demo's detector stayed at AUC 0.52 with it, 0.82 with this.
    Padded by hand: of a channels_last map on a GPU, torch 2.11 gives avg_pool2d with a padding another gradient
    (PyTorch issue 188344); with it the norm of a detector's gradient was 3 to 5 times too large.
    """

    def __init__(self, kernel_size: int, stride: int, padding: int):
        super().__init__()
        self.window, self.border = {"kernel_size": kernel_size, "stride": stride}, (padding,) * 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.exp(x - x.detach().amax(dim=(2, 3), keepdim=True))
        sums, weights = (functional.pad(one, self.border) for one in (weights * x, weights))
        return functional.avg_pool2d(sums, **self.window) / functional.avg_pool2d(weights, **self.window)


def create_backbone(
    name: str,
    pretrained: bool | str,
    arguments: Mapping[str, object],
    others: Iterable[str] = (),
    place: str = "detector.name",
) -> tuple[nn.Module, int]:
    """A timm model without its head, and the channels of its last feature map.

    others: further names to suggest when there is no such model. place: the setting that names it, for error texts.
    pretrained: False, True (timm's default weights), a timm tag ("tv_in1k"), or a file with the backbone's weights.
    Raises DistFairError for an unknown name, tag or argument, for dropout (it would draw other numbers on every rank),
    and for weights that cannot be had or do not fit.
    """
    import timm

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise DistFairError(f"{place}={name}: no such detector: {nearest(name, [*others, *timm.list_models()])}")
    path = pretrained if isinstance(pretrained, str) and _is_path(pretrained) else None
    tag = pretrained if isinstance(pretrained, str) and not path else tag
    if tag:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
        if tag not in tags:
            raise DistFairError(f"detector.pretrained={tag}: {base} has no such weights: {nearest(tag, tags)}")
    dropping = [key for key, value in arguments.items() if "drop" in key and value]
    if dropping:
        raise DistFairError(
            f"detector.arguments.{dropping[0]}={arguments[dropping[0]]}: dropout draws other numbers on every rank: "
            f"results would depend on how many there are; leave it out"
        )
    full_name = f"{base}.{tag}" if tag else base
    from_hub = bool(pretrained) and not path
    backbone = (_from_hub if from_hub else _untrained)(full_name, arguments, place)
    channels, removed = _trim(backbone)
    _refuse_dropout(backbone)
    if path:
        load_weights(backbone, path, {*_CLASSIFIERS, *removed})
    return backbone, channels


def _untrained(name: str, arguments: Mapping[str, object], place: str) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=False, num_classes=0, global_pool="", **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        raise DistFairError(
            f"{place}={name}: timm cannot build it headless with arguments {dict(arguments)}: {error}"
        ) from error


def _from_hub(name: str, arguments: Mapping[str, object], place: str) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=True, num_classes=0, global_pool="", **arguments)
    except Exception as error:  # hub, network, proxy, disk and cache each have their own
        _untrained(name, arguments, place)  # if it is the arguments, that is what to say
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DistFairError(
            f"detector.pretrained: the weights of {name} could not be had from the hub ({reason}); fetch them once "
            f"where there is a network (HF_HOME names the cache), or give a file: detector.pretrained=PATH.safetensors"
        ) from error


def _is_path(text: str) -> bool:
    return text.endswith(SUFFIXES) or os.sep in text


def _refuse_dropout(backbone: nn.Module) -> None:
    for name, module in backbone.named_modules():
        rate = max(getattr(module, attribute, 0.0) or 0.0 for attribute in ("p", "drop_prob", "prob"))
        if "Drop" in type(module).__name__ and rate > 0:
            raise DistFairError(
                f"detector: {type(backbone).__name__} drops out at '{name}' (rate {rate}), with other random "
                f"numbers on every rank; switch it off: detector.arguments.drop_rate=0 or drop_path_rate=0"
            )


def last_map(backbone: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The last feature map, (B, C, h, w): timm's own, channels-last ones transposed, patch tokens put back in place."""
    output = backbone.forward_features(images)
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else output
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if output.ndim == 3 and grid:
        tokens = output[:, getattr(backbone, "num_prefix_tokens", 0) :]
        if tokens.shape[1] == grid[0] * grid[1]:
            return tokens.transpose(1, 2).unflatten(2, tuple(grid))
    raise DistFairError(
        f"detector: {type(backbone).__name__} gives {tuple(output.shape)}, not a map of features; "
        f"choose a convolutional backbone, or a ViT whose patches form a grid"
    )


def _trim(backbone: nn.Module) -> tuple[int, set[str]]:
    """Removes the modules that take no part in the last feature map; returns its channels, and where they were."""
    training = backbone.training
    with torch.enable_grad():
        feature_map = last_map(backbone.eval(), _probe(backbone))
    backbone.train(training)
    used, removed = _leaves(feature_map), set()
    for name, parameter in list(backbone.named_parameters()):
        if parameter not in used:
            owner = name.rpartition(".")[0]
            if not owner or used & set(backbone.get_submodule(owner).parameters()):
                raise DistFairError(
                    f"detector: parameter '{name}' of {type(backbone).__name__} takes no part in its last feature "
                    f"map and cannot be removed; choose another backbone"
                )
            backbone.set_submodule(owner, nn.Identity())
            removed.add(owner.split(".")[0])
    return feature_map.shape[1], removed


def _leaves(tensor: torch.Tensor) -> set[torch.Tensor]:
    """The parameters that `tensor` was computed from."""
    seen, waiting, leaves = set(), [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return leaves


def _probe(backbone: nn.Module) -> torch.Tensor:
    """One black image of a size the backbone takes."""
    first = next(layer for layer in backbone.modules() if isinstance(layer, nn.Conv2d))
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if size is None:
        configured = backbone.pretrained_cfg["input_size"][1:]
        size = configured if backbone.pretrained_cfg.get("fixed_input_size") else (_PROBE, _PROBE)
    return torch.zeros(1, first.in_channels, *size, device=first.weight.device, dtype=first.weight.dtype)


def full_precision(tensor: torch.Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
