"""PG-FDD's detector: disentangled features of forgery, content and demographics, the first and last fused for the score
(Lin, He, Ju, Wang, Ding, Hu: Preserving Fairness Generalization in Deepfake Detection, CVPR 2024, sec. 3.1).

    encoders   F, C, D = E_f, E_c, E_d (images)              (B, width, h, w): backbone, 1x1 convolution, norm, ReLU
    blocks     f_share, f_spe of F; f_fair of D              (B, width/2, h, w), three 1x1 convolutions
    fusion     fused = AdaIN(f_fair, f_share)                f_fair's pattern, f_share's mean and spread
    score      softmax(classifier(pooled(fused)))
    training   logits of f_share, f_spe and f_fair, pooled by their means, each by a head of its own
               images = G(cat(f_spe, f_share), AdaIN(D, C))  see ConditionalDecoder

The pooling trap. The released code pools `fused` by its mean over positions, and the mean of AdaIN(x, y) is the mean of
y, exactly, whatever x is (see `adain`). So its score is a function of mean(f_share) alone: it does not depend on the
demographic encoder, to which the detection loss gives no gradient; the fusion cancels. With `pooling: rectified`, ours,
the mean is taken after a leaky ReLU (or ScaledSiLU), and the score depends on both. With `pooling: average`, as
released, the mean of f_share is taken at once: the same score, with one encoder less to run in evaluation.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from dist_fair import keyed
from dist_fair.detectors.base import Detector, Outputs, keep_outputs
from dist_fair.detectors.conditional_decoder import ConditionalDecoder, adain
from dist_fair.detectors.pg_fdd_arguments import PLACE, Arguments, chosen_arguments
from dist_fair.detectors.registry import register
from dist_fair.detectors.timm_backbone import (
    adjustment,
    backbone_arguments,
    create_backbone,
    full_precision,
    last_map,
    smoothed,
)
from dist_fair.errors import DistFairError
from dist_fair.keyed_rows import dropout, mixed

_SOURCES = {"shared": "forgery", "specific": "forgery", "demographic": "demographic"}  # block -> encoder
_SLOPE = 0.01  # of the leaky ReLUs


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, width, h, w)."""

    def __init__(self, backbone: nn.Module, channels: int, width: int):
        super().__init__()
        self.backbone, self.adjust = backbone, adjustment(backbone, channels, width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.adjust(last_map(self.backbone, images))


class ScaledSiLU(nn.Module):
    """x sigmoid(x / s), s the spread of x over its positions, per sample and channel: a rectifier without a kink whose
    bend is as wide as the map, (B, C, h, w).

    SiLU itself falls into the trap again: near 0 it is x/2 + x^2/4, and AdaIN gives `fused` f_share's mean square as it
    gives its mean. In an untrained detector on a ResNet-10 (spread 0.03), other rows' f_fair move the
    features by 0.1 % of their own spread with SiLU, about 15 % with this, 20 % with a leaky ReLU.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spread = (x.var(dim=(2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        return x * torch.sigmoid(x / spread)


class PGFDD(Detector):
    """images (B, 3, H, W) -> feature_map (B, width/2, h, w), features (B, width/2), logits (B, 2).

    encoder: makes an encoder; called for each. needs: extra -> number of classes of logits, else 0; see `offers`.
    smooth: see `smoothed`.
    Extras, one row per sample: "shared_logits" (B, 2), "specific_logits", "demographic_logits" (B, classes), "shared"
    and "specific" (B, width/2), the pooled blocks; for "reconstruction" the decoder's "code" and "condition"
    (B, width, h, w), and `decode`. Only the parts that the score and `needs` take are built. feature_map is what is
    pooled: fused, rectified (with pooling=average: f_share), masked. Features and logits in fp32+, also under autocast.
    """

    offers = ("shared_logits", "specific_logits", "demographic_logits", "shared", "specific", "reconstruction")

    def __init__(
        self, encoder: Callable[[], nn.Module], arguments: Arguments, needs: Mapping[str, int], smooth: bool = False
    ):
        half, heads = arguments.width // 2, arguments.heads
        super().__init__(half, half)
        self.arguments = arguments
        self.needs = {name: needs[name] for name in self.offers if name in needs}
        self.fuses = arguments.fusion == "adain" and arguments.pooling == "rectified"
        rebuilds, groups = "reconstruction" in needs, "demographic_logits" in needs
        encoders = {"forgery": True, "demographic": self.fuses or groups or rebuilds, "content": rebuilds}
        blocks = {
            "shared": True,
            "specific": rebuilds or "specific" in needs or "specific_logits" in needs,
            "demographic": self.fuses or groups,
        }
        self.encoders = nn.ModuleDict({name: encoder() for name, taken in encoders.items() if taken})
        self.blocks = nn.ModuleDict({name: _block(2 * half) for name, taken in blocks.items() if taken})
        rectifier = ScaledSiLU() if smooth else nn.LeakyReLU(_SLOPE)
        self.rectifier = rectifier if arguments.pooling == "rectified" else nn.Identity()
        self.classifier = _head(half, heads.hidden, 2)
        self.heads = nn.ModuleDict(
            {name: _head(half, heads.hidden, classes) for name, classes in self.needs.items() if _is_logits(name)}
        )
        self.decoder = ConditionalDecoder(2 * half, arguments.decoder.dropout) if rebuilds else None
        if smooth:
            smoothed(self)

    def extract(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> Outputs:
        images = images.to(self.classifier[0].weight.dtype)
        chosen = [*self.blocks] if self.training else self._scoring_blocks()
        encoders = [*self.encoders] if self.training else [_SOURCES[name] for name in chosen]
        encoded = {name: self.encoders[name](images) for name in encoders}
        blocks = {name: self.blocks[name](encoded[_SOURCES[name]]) for name in chosen}
        if self.fuses or (self.training and self.decoder):
            _refuse_single_position(encoded["forgery"], images)
        fused = adain(blocks["demographic"], blocks["shared"]) if self.fuses else blocks["shared"]
        feature_map = self.unmasked(self.rectifier(fused))
        features = _pooled(feature_map)
        outputs = Outputs(features.new_empty((len(features), 0)), features, feature_map)
        if self.training:
            outputs.extras = self._extras(encoded, blocks, keys)
            outputs.decode = self._decode_like(images) if self.decoder else None
        return outputs

    def classify(self, features: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        return self._logits(self.classifier, features, keys, "classifier")

    def resize_classifier(self, features: int) -> None:
        first = self.classifier[0]
        kind = {"device": first.weight.device, "dtype": first.weight.dtype}
        self.classifier[0] = nn.Linear(features, first.out_features, **kind)

    def features_layer(self) -> nn.Linear:
        return self.classifier[0]

    def narrow(self, kept: torch.Tensor) -> bool:
        for name in self._scoring_blocks():  # AdaIN and the rectifier work channel by channel
            keep_outputs(self.blocks[name][-1], kept)
        return True

    def scoring_parameters(self) -> int:
        blocks = self._scoring_blocks()
        parts = [self.classifier, *(self.blocks[name] for name in blocks),
                 *(self.encoders[_SOURCES[name]] for name in blocks)]  # fmt: skip
        return sum(parameter.numel() for part in parts for parameter in part.parameters())

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, partners: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the decoder makes of images (B, 3, H, W), without dropout; call it in evaluation mode.

        partners: (B,) int64, rows of the batch. Returns own and crossed images (B, 3, H, W) in (-1, 1), both with
        content and demographics of row i; own with its own forgery, crossed with that of row partners[i].
        Raises DistFairError if no intervention of the recipe needs reconstructions: there is no decoder then.
        """
        if self.decoder is None:
            raise DistFairError("detector.name=pg_fdd: trained without a decoder: reconstructions need an intervention "
                                "that reads them, +interventions.reconstruction_loss={}")  # fmt: skip
        images = images.to(self.classifier[0].weight.dtype)
        encoded = {name: encoder(images) for name, encoder in self.encoders.items()}
        _refuse_single_position(encoded["forgery"], images)
        blocks = {name: self.blocks[name](encoded["forgery"]) for name in ("specific", "shared")}
        code, condition = _code_and_condition(encoded, blocks)
        decode = self._decode_like(images)
        return decode(code, condition), decode(code[partners], condition)

    def _scoring_blocks(self) -> list[str]:
        return ["shared", "demographic"] if self.fuses else ["shared"]

    def _extras(
        self, encoded: Mapping[str, torch.Tensor], blocks: Mapping[str, torch.Tensor], keys: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        extras = {}
        for name in self.needs:
            if name == "reconstruction":
                extras["code"], extras["condition"] = _code_and_condition(encoded, blocks)
            elif _is_logits(name):
                features = _pooled(blocks[name.removesuffix("_logits")])
                extras[name] = self._logits(self.heads[name], features, keys, name)
            else:
                extras[name] = _pooled(blocks[name])
        return extras

    def _logits(self, head: nn.Module, features: torch.Tensor, keys: torch.Tensor | None, place: str) -> torch.Tensor:
        """place: names the head; each drops other elements. Not in half precision: heads are small, margins are not."""
        chosen = self.arguments.heads

        def dropped(x: torch.Tensor, on: str) -> torch.Tensor:
            if keys is None or on != chosen.dropout_on:
                return x
            return dropout(x, chosen.dropout, mixed(keys, keyed.integer("dropout", "head", place)))

        with torch.autocast(features.device.type, enabled=False):
            logits = dropped(head(dropped(features.to(head[0].weight.dtype), "features")), "logits")
        return logits.to(full_precision(logits))

    def _decode_like(self, images: torch.Tensor) -> Callable[..., torch.Tensor]:
        """`decode` of Outputs: for images of this size, in the precision that autocast asks for here and now."""
        device = images.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return partial(self._decode, tuple(images.shape[2:]), dtype if enabled else None)

    def _decode(
        self,
        size: tuple[int, int],
        half: torch.dtype | None,
        code: torch.Tensor,
        condition: torch.Tensor,
        keys: torch.Tensor | None = None,
    ) -> torch.Tensor:
        with torch.autocast(code.device.type, dtype=half, enabled=half is not None):
            images = self.decoder(code, condition, size, keys)
        return images.to(full_precision(images))


@register("pg_fdd")
def build_pg_fdd(pretrained: bool | str, arguments: Mapping[str, object], needs: Mapping[str, int]) -> PGFDD:
    """The detector of a recipe. pretrained: of each encoder, as for a timm model. arguments: see Arguments; `smooth`
    (see `smoothed`) and what is left are for the backbone. Raises DistFairError for what they cannot be.
    """
    others, smooth = backbone_arguments(arguments, pretrained)
    chosen, others = chosen_arguments(others)

    def encoder() -> Encoder:
        backbone, channels = create_backbone(chosen.backbone, pretrained, others, place=f"{PLACE}.backbone")
        return Encoder(backbone, channels, chosen.width)

    return PGFDD(encoder, chosen, needs, smooth)


def _block(width: int) -> nn.Sequential:
    half = width // 2
    return nn.Sequential(
        nn.Conv2d(width, half, 1), nn.LeakyReLU(_SLOPE), nn.Conv2d(half, half, 1), nn.LeakyReLU(_SLOPE),
        nn.Conv2d(half, half, 1)
    )  # fmt: skip


def _head(features: int, hidden: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, hidden), nn.LeakyReLU(_SLOPE), nn.Linear(hidden, classes))


def _is_logits(extra: str) -> bool:
    return extra.endswith("_logits")


def _pooled(feature_map: torch.Tensor) -> torch.Tensor:
    return feature_map.mean(dim=(2, 3), dtype=full_precision(feature_map))


def _code_and_condition(encoded: Mapping[str, torch.Tensor], blocks: Mapping[str, torch.Tensor]):
    code = torch.cat([blocks["specific"], blocks["shared"]], dim=1)
    return code, adain(encoded["demographic"], encoded["content"])


def _refuse_single_position(encoded: torch.Tensor, images: torch.Tensor) -> None:
    if encoded.shape[2:].numel() == 1:
        height, width = images.shape[2:]
        raise DistFairError(
            f"detector.name=pg_fdd: images of {height}x{width} pixels leave the backbone as one position, which has no "
            "spread for AdaIN: a larger data.image_size, or +detector.arguments.output_stride=16"
        )
