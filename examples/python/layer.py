"""An MoE layer in plain PyTorch: one expert learns, four spawn from it, and the gate becomes sparse.

python examples/python/layer.py
"""

import torch

from fairseq_evomoe.moe import MoELayer, RoutingContext, record

torch.manual_seed(1)
maps = torch.randn(4, 8, 8)  # what is learned is another linear function in each of four parts of the space
layer = MoELayer(8, 16, experts=4, router="dts", balance_weight=0.01)
for update in range(1, 601):
    if update == 201:
        layer.spawn(method="mask", strength=0.1)
    if update in (1, 201):  # the spawned parameters are new, and so is their optimizer
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    x = torch.randn(256, 8)
    wanted = torch.einsum("nd,nde->ne", x, maps[2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long()])
    gate = RoutingContext(temperature=max(0.5, 2.0 - max(update - 200, 0) / 270), hard=update > 440)
    with record() as routings:
        loss = (layer(x, gate) - wanted).square().mean()
    optimizer.zero_grad()
    (loss + routings.auxiliary_loss()).backward()
    optimizer.step()
    if update % 100 == 0:
        report = routings[layer].report()
        experts = report.assignments / report.tokens
        print(f"update {update}: loss {loss.item():.2f}, {experts:.1f} experts a token")
