"""A module tree becomes a pruned model: :func:`make_pruned`, which :func:`madtp.rewrite` calls.

Then :func:`replace_forward` and :func:`replace_forwards` let programs run in place of its modules.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from madtp.calls.packed_images import PerImageArguments
from madtp.config import PruningConfig
from madtp.errors import RewriteError
from madtp.programs.chain import PrunedChain
from madtp.programs.chained_modules import Chain
from madtp.programs.host_forward import HostForward
from madtp.programs.packed_images_region import PerImageRegion
from madtp.programs.program_builder import BuildProgram
from madtp.programs.program_cache import ProgramCache
from madtp.programs.region import PrunedRegion
from madtp.programs.whole_forward import WholeForward
from madtp.pruned.handle import AlignmentSpec, PruningHandle
from madtp.pruned.host_class import pruned_class
from madtp.pruned.model import PrunedModel
from madtp.report import RewriteReport
from madtp.sites.additions import PREFIX
from madtp.sites.control import PruningControl
from madtp.sites.spec import SiteSpec


def make_pruned(
    host: nn.Module,
    *,
    sites: Mapping[str, SiteSpec],
    config: PruningConfig,
    report: RewriteReport,
    alignment: AlignmentSpec,
) -> PrunedModel:
    """Make a pruned model of a module tree, by adding what pruning needs and changing its class.

    Programs are still missing; see :func:`replace_forward`.

    Args:
        host: a copy of the original's module tree, which becomes the pruned model.
        sites: the sites, by the names that they get as modules.
        config: how tokens are pruned.
        report: the report of the rewrite.
        alignment: what the alignment tokens have to fit.

    Raises:
        RewriteError: the host has an attribute named ``madtp``.
    """
    if hasattr(host, PREFIX):
        raise RewriteError(f"the model has an attribute named {PREFIX!r}; that name is taken for what pruning adds.")
    made = pruned_class(host)
    control = PruningControl(config, temperature=config.temperature, gain=config.gain)
    handle = PruningHandle(sites, control, report, alignment)
    report.parameters, report.added_parameters = (sum(p.numel() for p in one.parameters()) for one in (host, handle))
    example = next(host.parameters(), None)
    if example is not None:
        handle.to(device=example.device, dtype=example.dtype if example.dtype.is_floating_point else None)
    handle.train(host.training)
    handle.own_forward = host.__dict__.pop("forward", None)
    host._modules[PREFIX] = handle
    host.__class__ = made
    assert isinstance(host, PrunedModel)
    return host


def replace_forward(
    pruned: PrunedModel,
    path: str,
    build_program: BuildProgram,
    *,
    inner: bool = False,
    embeddings: str = "",
    per_image: PerImageArguments | None = None,
) -> ProgramCache:
    """Let programs run in place of a module of a pruned model.

    Args:
        pruned: the pruned model.
        path: the path of the module; empty for the whole host.
        build_program: builds a program for one more kind of call.
        inner: the module lies inside another one that programs replace.
        embeddings: path in its call of the text embeddings, if programs need to know at which positions these hold image
            features.
        per_image: which arguments hold the images, if calls are split into images. None if they are not.

    Returns:
        The program cache of the module, still empty.
    """
    handle = pruned.madtp
    control, notes = handle.control, handle.notes
    programs = ProgramCache(path, pruned, build_program, inner=inner, per_image=per_image)
    if not path and per_image is None:
        handle.forward_of_host = WholeForward(programs, control, notes)
        return programs
    region = (
        PrunedRegion(programs, control, notes, embeddings=embeddings)
        if per_image is None
        else PerImageRegion(programs, per_image, control, notes)
    )
    if path:
        programs.module.__dict__["forward"] = region
    else:
        handle.own_forward = region
    if handle.forward_of_host is None or not path:
        handle.forward_of_host = HostForward(pruned, control, notes)
    if isinstance(handle.forward_of_host, HostForward):
        handle.forward_of_host.follows_features |= bool(embeddings)
        handle.forward_of_host.programs.append(programs)
    return programs


def replace_forwards(
    pruned: PrunedModel, chain: Chain, build_program: BuildProgram, *, embeddings: str = ""
) -> ProgramCache:
    """Let programs run in place of modules of a pruned model that its host calls one after the other.

    Args:
        pruned: the pruned model.
        chain: the modules.
        build_program: as in :func:`replace_forward`.
        embeddings: as in :func:`replace_forward`.

    Returns:
        The program cache of the modules, still empty.
    """
    handle = pruned.madtp
    programs = ProgramCache("", pruned, build_program, chain=chain)
    PrunedChain(chain, programs, handle.control, handle.notes, embeddings)
    if handle.forward_of_host is None:
        handle.forward_of_host = HostForward(pruned, handle.control, handle.notes)
    assert isinstance(handle.forward_of_host, HostForward)
    handle.forward_of_host.chained = True
    handle.forward_of_host.follows_features |= bool(embeddings)
    return programs
