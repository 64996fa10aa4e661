"""An MoE layer in plain PyTorch: one expert learns, four spawn from it, and the gate becomes sparse.

python examples/python/layer.py
"""

import torch

from fairseq_evomoe.moe import MoELayer, RoutingContext, record


def main(updates: int = 600, spawn_update: int = 200) -> float:
    """Learn a function that is another linear one in each of four parts of the space; the last loss."""
    torch.manual_seed(1)
    maps = torch.randn(4, 8, 8)
    layer = MoELayer(8, 16, experts=4, router="dts", balance_weight=0.01)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for update in range(updates):
        if update == spawn_update:
            layer.spawn(method="mask", strength=0.1)  # the parameters are new, and so is their optimizer
            optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        done = max(update - spawn_update, 0) / (updates - spawn_update)
        x = torch.randn(256, 8)
        part = 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        with record() as routings:
            y = layer(x, RoutingContext(temperature=2.0 - 1.5 * done, hard=done > 0.6))
        loss = (y - torch.einsum("nd,nde->ne", x, maps[part])).square().mean()
        optimizer.zero_grad()
        (loss + routings.auxiliary_loss()).backward()
        optimizer.step()
        if (update + 1) % 100 == 0:
            report = routings[layer].report()
            experts = report.assignments / report.tokens
            print(f"update {update + 1}: loss {loss.item():.2f}, {experts:.1f} experts a token")
    return loss.item()


if __name__ == "__main__":
    main()
