"""Expert output masking (EOM): a regularisation of experts (NLLB, arXiv 2207.04672)."""

from dataclasses import replace

from .routing import Routing, RoutingContext, at_pairs


def mask_outputs(routing: Routing, share: float, training: bool, context: RoutingContext) -> None:
    """Leave out what experts say to random tokens, in place: a factor of each pair's weight.

    While training it is 0 with a probability, and else 1, for each pair of token and expert by itself; in
    evaluation it is the mean of that.  Losses, which routers compute before, and loads do not see it.

    Args:
        routing: the active pairs.
        share: the probability, from 0 to 1.
        training: whether the layer is being trained.
        context: of the pass.
    """
    if not training:
        routing.weight_N = routing.weight_N * (1 - share)
        return
    key = context.noise_key
    context = replace(context, noise_key=None if key is None else (*key, "output masking"))
    draw_TE = context.uniform(routing.weight_N.new_empty(routing.tokens, routing.experts))
    kept_N = at_pairs(draw_TE, routing.token_N, routing.expert_N) >= share
    routing.weight_N = routing.weight_N * kept_N
