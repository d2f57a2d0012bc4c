"""Sparse experts in the many ways that models write them. Start at :data:`SPELLINGS`.

Each is a module over tokens [B, N, C] in which every token is worked on by the experts that it chooses.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from attention_spellings import WIDTH, Speller, sdpa, spelled_case
from model_case import Case, lively
from torch import Tensor, nn

EXPERTS, INNER, CHOSEN = 4, 12, 2


class Experts(nn.Module):
    """A router and the weights of experts, as modules and stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)) for _ in range(EXPERTS)
        )
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        return self.work(flat, *self.route(flat)).reshape(x.shape)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the experts that rows [T, C] choose, [T, CHOSEN] each."""
        weights, chosen = self.gate(x).softmax(-1).topk(CHOSEN, -1)
        return weights / weights.sum(-1, keepdim=True), chosen

    def work(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Rows [T, C] -> [T, C]."""
        raise NotImplementedError


class EveryRowMasked(Experts):
    def work(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            total = total + expert(x) * ((chosen == number) * weights).sum(-1, keepdim=True)
        return total


class AllExperts(Experts):
    def work(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        gates = (F.one_hot(chosen, EXPERTS) * weights[..., None]).sum(1)
        inner = F.gelu(torch.einsum("tc,ech->teh", x, self.up))
        return (torch.einsum("teh,ehc->tec", inner, self.down) * gates[..., None]).sum(1)


class RowsOfEach(Experts):
    def work(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        mask = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            place, rows = torch.where(mask[number])
            total.index_add_(0, rows, expert(x[rows]) * weights[rows, place, None])
        return total


class RowsOfHit(Experts):
    def work(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        mask = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        for (number,) in (mask.sum((-1, -2)) > 0).nonzero():
            place, rows = torch.where(mask[number])
            inner = F.gelu(x[rows] @ self.up[number]) @ self.down[number]
            total.index_add_(0, rows, inner * weights[rows, place, None])
        return total


class SkipsIdle(Experts):
    def work(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            hit = (chosen == number).any(-1)
            if hit.sum() > 0:
                total[hit] += expert(x[hit]) * ((chosen == number) * weights).sum(-1)[hit, None]
        return total


class SortedRows(Experts):
    def work(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()
        groups = x[order // CHOSEN].split(counts)
        done = torch.cat([expert(rows) for expert, rows in zip(self.experts, groups, strict=True)])
        back = torch.empty_like(done)
        back[order] = done
        return (back.view(-1, CHOSEN, WIDTH) * weights[..., None]).sum(1)


class Apart(nn.Module):
    """A router whose choice goes into a module of its own, with a side result beside."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.workers = Workers()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.gate(flat).softmax(-1).topk(CHOSEN, -1)
        done, share, _ = self.workers(flat, chosen=chosen, weights=weights)
        return (done * (1 + share)).view(x.shape)


class Workers(RowsOfHit):
    """Experts that are told who chose them."""

    def forward(  # type: ignore[override]
        self, x: Tensor, *, chosen: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        return self.work(x, weights, chosen), weights.amax(-1, keepdim=True), None


class OfSamples(RowsOfHit):
    """Tokens [B, N, C] go in as they are."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x.flatten(0, 1))
        return self.work(x.flatten(0, 1), weights, chosen).view(x.shape)


SPELLINGS = (EveryRowMasked, AllExperts, RowsOfEach, RowsOfHit, SkipsIdle, SortedRows, Apart, OfSamples)


class Capacity(SkipsIdle):
    """An expert takes its first rows only."""

    limit = 40

    def work(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).any(-1).nonzero()[: self.limit, 0]
            total[rows] += expert(x[rows])
        return total


class ChoosesRows(Experts):
    """Experts choose the rows that they like best."""

    def work(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = self.gate(x)[:, number].sort(descending=True).indices[: len(x) // 2]
            total = total.index_add(0, rows, expert(x[rows]))
        return total


class SilentContext(RowsOfHit):
    """The mean of all rows comes in through a gate that is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(()))

    def work(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return super().work(x, weights, chosen) + self.strength * x.mean(0)


class Balanced(RowsOfHit):
    """Beside its rows it returns one number for all."""

    def forward(self, x: Tensor) -> Tensor:
        return self.balance(x)[0]

    def balance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        done = super().forward(x)
        return done * done.abs().mean(), done.mean()


MISSES = (Capacity, ChoosesRows, SilentContext, Balanced)


def experts_case(kind: type[nn.Module]) -> Case:
    """A case of two blocks whose feed-forward are experts of a kind."""

    def build() -> nn.Module:
        model = Speller(sdpa, sdpa)
        for block in model.blocks:
            block.mlp = kind()
        silent = [module for module in model.modules() if isinstance(module, SilentContext)]
        model = lively(model)
        for module in silent:
            nn.init.zeros_(module.strength)
        return model

    return dataclasses.replace(spelled_case(kind.__name__, sdpa, sdpa), build=build)
