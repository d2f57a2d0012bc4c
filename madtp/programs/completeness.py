"""How much of a model is pruned: :func:`unpruned_remark`."""

from __future__ import annotations

from madtp.report import RefusalReport, RewriteReport

SHOWN = 3


def unpruned_remark(report: RewriteReport) -> str | None:
    """Return what to say of blocks that are not pruned although nobody asked for that.

    None where no more than a third of the blocks are refused, and in every tower some block is pruned. Blocks that are left
    alone by policy do not count.

    Args:
        report: of a rewrite.
    """
    refused: dict[str, RefusalReport] = {}
    for refusal in report.refusals:
        if not refusal.by_policy:
            refused.setdefault(refusal.block, refusal)
    pruned = {site.name.partition("#")[0] for site in report.sites}
    refused = {block: refusal for block, refusal in refused.items() if block not in pruned}
    dense = set(map(_tower, refused)) - set(map(_tower, pruned))
    if not dense and 3 * len(refused) <= len(refused) + len(pruned):
        return None
    causes: dict[tuple[str, str], list[str]] = {}
    for block, refusal in refused.items():
        causes.setdefault((refusal.reason, refusal.help), []).append(block)
    told = [
        f"{', '.join(blocks[:SHOWN])}{' ...' if len(blocks) > SHOWN else ''}: {reason} (what would help: {remedy})"
        for (reason, remedy), blocks in list(causes.items())[:SHOWN]
    ]
    return (
        f"{len(refused)} of {len(refused) + len(pruned)} blocks are not pruned. {'; '.join(told)}. "
        "`print(pruned.madtp.report)` lists them all."
    )


def _tower(block: str) -> str:
    """The path of the list of blocks that holds a block: what stands before its number."""
    parts = block.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:number])
