"""Expert parallelism: each rank owns some experts, and tokens travel to the owners of their experts and back (all-to-all)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rorqual.errors import UserError
from rorqual.kernels.experts import experts
from rorqual.model.moe import Experts
from rorqual.parallel.collectives import ExchangeRows, exchange


class TravellingExperts(nn.Module):
    """Stands in for Experts: w1, w2, w3 are cut along the expert dim, rank r owning the r-th run of E / size experts."""

    def __init__(self, whole: Experts, mesh: DeviceMesh):
        super().__init__()
        size, count = mesh.size(), whole.w1.shape[0]
        if count % size:
            raise UserError(f"parallel.expert {size}: does not divide the {count} experts")
        self.mesh, self.own_count = mesh, count // size
        for name, weight in list(whole.named_parameters()):
            self.register_parameter(
                name, nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]), weight.requires_grad)
            )

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """x [N, D], chosen int64 [N, K], gates float32 [N, K] -> sum_k gates[:, k] E_k(x): [N, D]. N differs between ranks."""
        K = chosen.shape[1]
        pairs = chosen.flatten()
        order = pairs.argsort(stable=True)  # by expert, hence by owner
        sent = torch.bincount(pairs // self.own_count, minlength=self.mesh.size())
        received = torch.empty_like(sent)
        group = self.mesh.get_group()
        dist.all_to_all_single(received, sent, group=group)
        there, back = received.tolist(), sent.tolist()

        rows: Tensor = ExchangeRows.apply(x[order // K], there, back, group)  # type: ignore[assignment] # [M, D]
        own = exchange(pairs[order], there, back, group)
        first = self.mesh.get_local_rank() * self.own_count
        ones = torch.ones(len(own), 1, dtype=gates.dtype, device=x.device)
        w1, w2, w3 = (_local(weight).to(x.dtype) for weight in self.parameters())  # masters are float32
        y = experts(rows, w1, w2, w3, (own - first)[:, None], ones)
        y: Tensor = ExchangeRows.apply(y, back, there, group)  # type: ignore[assignment] # [N K, D], in `order`
        weighted = y.float() * gates.flatten()[order, None]
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add(0, order // K, weighted).to(x.dtype)


def _local(weight: Tensor) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local()
