"""The child ``madtp`` of a pruned model, with all that pruning adds, and how one works with it: :class:`PruningHandle`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor

from madtp.config import PruningConfig
from madtp.errors import ConfigError, MadtpError
from madtp.method.guidance import ImageOrder, alignment_loss, mean_over_images, sum_of_streams
from madtp.programs.host_forward import HostForward
from madtp.programs.notes import Notes
from madtp.programs.pricing import Tokens, macs_by_module
from madtp.programs.pruned_methods import PrunedMethods
from madtp.programs.whole_forward import WholeForward
from madtp.report import RewriteReport
from madtp.sites.additions import Additions
from madtp.sites.control import PruningControl
from madtp.sites.forward_record import ForwardRecord
from madtp.sites.spec import SiteSpec
from madtp.sites.stream_start import SUFFIX
from madtp.tokens.cache_bytes import CacheBytes, bytes_of_caches
from madtp.tokens.state import TokenState, kept_positions


@dataclass(frozen=True, kw_only=True)
class AlignmentSpec:
    """What the alignment tokens have to fit.

    Attributes:
        width: d_e, the width of the alignment tokens.
        images: number of images that belong to one text.
        image_order: how the images of a batch are stacked: ``"blocked"`` has the first images of all samples, then the second
            ones; ``"interleaved"`` keeps a sample's images together.
    """

    width: int
    images: int = 1
    image_order: ImageOrder = "blocked"


class PruningHandle(Additions):
    """What pruning adds to a model: its child ``madtp``.

    Strength and configuration belong to the model. :meth:`dense`, :meth:`aside` and the record of the last forward belong to
    the thread or asyncio task that uses them.

    Attributes:
        report: what was found and done. ``str()`` of it is a table.
        example: the call that the model was rewritten with, as :func:`madtp.calls.record.record_call` keeps it.
        alignment_spec: what the alignment tokens fit.
        alignment_weight: factor of the alignment loss in the loss that the model returns in training. 0, the default, leaves
            the model's loss alone; then add :meth:`alignment_loss` yourself.

    Example::

        pruned = madtp.rewrite(model, inputs)
        madtp.calibrate(pruned, batches, reduction=0.5)
        output = pruned(**inputs)
        pruned.madtp.token_counts()  # {"visual_encoder.blocks.0": tensor([412, 397]), ...}
    """

    def __init__(
        self,
        sites: Mapping[str, SiteSpec],
        control: PruningControl,
        report: RewriteReport,
        alignment: AlignmentSpec,
    ) -> None:
        """Make the additions. :func:`madtp.rewrite` does that.

        Args:
            sites: the sites, by the names that they get as modules.
            control: shared by the sites.
            report: the report of the rewrite.
            alignment: what the alignment tokens have to fit.
        """
        super().__init__(list(sites.values()), list(sites), control, alignment.width)
        self.report = report
        self.example: dict[str, Any] = {"args": [], "kwargs": {}}
        self.alignment_weight = 0.0
        self.forward_of_host: WholeForward | HostForward | None = None
        self.methods: PrunedMethods | None = None
        self.alignment_spec = alignment

    def forward(self, value: Any) -> Any:
        """Return what it is given: a host that runs all its children one after the other runs this one, too."""
        return value

    @property
    def config(self) -> PruningConfig:
        """How tokens are pruned. Strength is set by :attr:`gain` and :attr:`temperature`, which start from it."""
        return self.control.config

    @config.setter
    def config(self, value: PruningConfig) -> None:
        if not isinstance(value, PruningConfig):
            raise ConfigError(
                f"config is a {type(value).__name__}; set a PruningConfig, such as PruningConfig(gain=2.0)."
            )
        self.control.config = value

    @property
    def temperature(self) -> float:
        """Temperature T of the threshold: larger prunes more; 0 switches pruning off and reproduces the original."""
        return self.control.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.control.temperature = _strength("temperature", value)

    @property
    def gain(self) -> float:
        """Factor on the threshold, which :func:`madtp.calibrate` sets: larger prunes more, 1 is the paper's threshold, and
        towards 0 the model approaches the dense one."""
        return self.control.gain

    @gain.setter
    def gain(self, value: float) -> None:
        self.control.gain = _strength("gain", value)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training recomputes the activations inside blocks in the backward pass, in place of storing them.

        It takes less memory and about a third more time, and gives the same gradients for the same tokens.
        """
        return self.control.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.control.gradient_checkpointing = bool(value)

    @property
    def notes(self) -> Notes:
        """Takes remarks on calls into the report."""
        return Notes(self.report, strict=self.config.strict)

    def token_counts(self) -> dict[str, Tensor]:
        """Number of tokens that each sample kept at each site in the last forward.

        Returns:
            ``{site: [B]}``; ``[2B]`` in a vision tower that takes two images a sample.
        """
        return {name: state.counts for name, state in self._states().items()}

    def token_lengths(self) -> dict[str, int]:
        """Number of tokens, padding included, in front of the first site of each site's stream in the last forward.

        Returns:
            ``{site: N}``; in a batch of several lengths, the longest.
        """
        return {name: state.full_length for name, state in self._states().items()}

    def kept_tokens(self) -> dict[str, Tensor]:
        """Which original tokens survive each site in the last forward; merged ones do not count.

        Returns:
            ``{site: [B, N] bool}``.
        """
        return {name: kept_positions(state) for name, state in self._states().items()}

    def cache_bytes(self, cache: object = None) -> CacheBytes | None:
        """Memory of a key/value cache, in bytes, and what it would take with the tokens that were dropped.

        Args:
            cache: the cache. None takes those that the last call with something to prune filled, as it left them.

        Returns:
            ``(held, dense)``. None if that call filled no cache.
        """
        return self.control.last_record().cache_bytes if cache is None else bytes_of_caches([cache])

    def surviving(self, tower: str) -> Tensor | None:
        """Which original tokens are left after the last site of a module in the last forward.

        A tower returns all tokens of a pruned stream; a dropped token has the state that it had when it was dropped. Whatever
        reads these tokens outside the model, such as a decoder that is called by itself, should attend to the survivors only.

        Args:
            tower: path of the module, as in the names of its sites.

        Returns:
            ``[B, N]`` bool, or None if the module has no site.
        """
        inside = [state for name, state in self._states().items() if name == tower or name.startswith(f"{tower}.")]
        return kept_positions(inside[-1]) if inside else None

    def aside(self) -> AbstractContextManager[None]:
        """Keep the record of the last forward: calls inside the block do not change token counts, survivors, MACs and the
        alignment loss."""
        return self.control.unrecorded()

    @contextmanager
    def dense(self) -> Iterator[PruningHandle]:
        """Switch pruning off inside the block, for this thread or task."""
        with self.control.unpruned():
            yield self

    def alignment_loss(self) -> Tensor:
        """Alignment loss L_align of the last forward (MAG): the mean of 1 - cos between the modalities' pooled features.

        It is zero, with a note in the report, where only one modality was pruned: there is nothing to align. Several views,
        frames or candidates of a sample count with their mean.

        Returns:
            A differentiable scalar.

        Raises:
            MadtpError: no forward with gradients enabled and pruning on has run, or the model has no alignment tokens.
        """
        features, spec = self.control.last_record().features, self.alignment_spec
        if not features or self.control.alignment is None:
            raise MadtpError(
                "the alignment loss needs features of image and text, and the last forward has none. Run a forward with "
                "gradients enabled and temperature above 0 on a model with alignment tokens."
            )
        order: ImageOrder = spec.image_order if spec.images > 1 else "interleaved"
        modalities = sorted({key.modality for key in features})
        if modalities != ["image", "text"]:
            self.notes.add(f"the alignment loss is zero: in this call only the {modalities[0]} is pruned")
            return 0.0 * self.control.alignment.tokens.sum()
        image, text = (
            sum_of_streams([pooled for key, pooled in features.items() if key.modality == one], order)
            for one in modalities
        )
        images = spec.images if spec.images > 1 else max(1, image.shape[0] // text.shape[0])
        image = mean_over_images(image, images, spec.image_order)
        if text.shape[0] % image.shape[0] == 0:
            image = image.repeat_interleave(text.shape[0] // image.shape[0], 0)
        return alignment_loss(image, text)

    def macs(self) -> float:
        """Multiply-accumulates (MACs) per sample of the last forward, from the token counts that it kept.

        The field's tables print this number as "FLOPs". Where regions are rewritten, what runs outside them is counted too, but
        only for calls of the model itself: after ``generate`` and the like this is the sum over the regions.
        """
        return sum(self.macs_by_module().values())

    def macs_by_module(self, tokens: Tokens = "kept") -> dict[str, float]:
        """:meth:`macs`, by module path.

        Args:
            tokens: which tokens to count: those that were ``"kept"``, ``"all"`` as without pruning, or ``"none"`` of those
                that may be pruned.
        """
        return macs_by_module(self._record(), tokens, pruning=self.control.active, guided=self.control.guided)

    def code(self) -> str:
        """The rewritten forward of the last call as Python source; where regions are rewritten, of one after the other."""
        programs = {id(run.program): run.program for run in self._record().runs}
        return "\n".join(p.graph.python_code("self").src for p in programs.values())

    def _states(self) -> dict[str, TokenState]:
        return {name: state for name, state in self._record().states.items() if not name.endswith(SUFFIX)}

    def _record(self) -> ForwardRecord:
        record = self.control.last_record()
        if not record.runs:
            raise MadtpError(
                "no forward has run yet, or the last one ran unpruned (see report.notes); call the model first."
            )
        return record


def with_alignment(output: Any, handle: PruningHandle) -> Any:
    """Add the alignment loss, times its weight, to the loss in what a model returned.

    Args:
        output: a scalar loss, a mapping or an object with a loss, or a sequence that begins with one.
        handle: of the model.
    """
    weight = handle.alignment_weight
    if not handle.control.last_record().features:
        return output
    if _is_loss(output):
        return output + weight * handle.alignment_loss()
    if isinstance(output, (tuple, list)) and not hasattr(output, "_fields") and output and _is_loss(output[0]):
        return type(output)((output[0] + weight * handle.alignment_loss(), *output[1:]))
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not _is_loss(own):
        handle.notes.add(
            "alignment_weight has no effect: what the model returns holds no loss; add alignment_loss() yourself"
        )
        return output
    loss = own + weight * handle.alignment_loss()
    if hasattr(output, "_replace"):
        return output._replace(loss=loss)
    if isinstance(output, Mapping):
        output["loss"] = loss  # type: ignore[index]  # a mapping that a model returns is its own
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, loss=loss)
    else:
        output.loss = loss
    return output


def _is_loss(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad


def _strength(name: str, value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} is {value!r}; it has to be a number of at least 0.") from error
    if not (0 <= number < float("inf")):
        raise ConfigError(f"{name} is {value!r}; it has to be a finite number of at least 0.")
    return number
