"""What makes a detector fair, one file each. Importing this package registers them all."""

from dist_fair.interventions import (
    channel_decoupling,
    conditional_value_at_risk,
    contrastive_loss,
    cross_entropy,
    distribution_alignment,
    inverse_propensity,
    low_rank_projection,
    margin_loss,
    pair_alignment,
    reconstruction_loss,
    shared_forgery,
    specific_forgery,
    subgroup_norm,
)

__all__ = [
    "channel_decoupling",
    "conditional_value_at_risk",
    "contrastive_loss",
    "cross_entropy",
    "distribution_alignment",
    "inverse_propensity",
    "low_rank_projection",
    "margin_loss",
    "pair_alignment",
    "reconstruction_loss",
    "shared_forgery",
    "specific_forgery",
    "subgroup_norm",
]
