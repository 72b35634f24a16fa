"""The backbone: a frozen module, how it sees images, its chain and its fingerprint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from modelpatch.backbone.chain import Chain, build_chain
from modelpatch.backbone.computation import SIDES, Computation, Computing
from modelpatch.backbone.fingerprint import Fingerprint
from modelpatch.backbone.places import LocalPlace
from modelpatch.backbone.preprocessing import Preprocessing
from modelpatch.backbone.text_tower import TextTower
from modelpatch.errors import (
    BackboneChangedError,
    BackboneError,
    PatchError,
    UncheckedComputationWarning,
    UntraceableBackboneError,
    WrongBackboneError,
    warn_caller,
)
from modelpatch.text import digest_of, first_line


@dataclass(eq=False, repr=False)
class Backbone:
    """A frozen network that patches refer to.

    The module is put into eval mode and its parameters stop requiring gradients; nothing in this library writes to it
    afterwards. `spec` and `arguments` say how to load it again, `classes` name the outputs of its own head, `about`
    holds whatever facts came with it (measured accuracy, licence, source), `text` is the text tower of an image tower,
    `segments` are the modules that were named to cut it, `fingerprints` the parts of its fingerprint, `computing` what it
    computes beside its tensors, `place` what loads it again from the files of this machine.
    """

    patched_model: ClassVar[type | None] = None  # `modelpatch.patch` sets it when it is imported

    module: nn.Module
    preprocessing: Preprocessing
    spec: str
    arguments: dict[str, Any] = field(default_factory=dict)
    classifier: str | None = None
    segments: Sequence[str] = ()
    classes: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)
    text: TextTower | None = None
    place: LocalPlace | None = None

    def __post_init__(self) -> None:
        if isinstance(self.module, torch.jit.ScriptModule):
            raise UntraceableBackboneError(
                f"{self.spec} is a script, which cannot be cut. Give the module it came from."
            )
        self.module.eval().requires_grad_(False)
        self.arguments, self.about = dict(self.arguments), dict(self.about)
        self.segments, self.classes = tuple(self.segments), tuple(self.classes)
        self._build_chain()
        for segment in self.chain:
            segment.module.eval()  # runs of calls, too, which are modules of the chain's own
        self.fingerprints = Fingerprint.of(self.chain)
        self.computing = Computing(self.chain, self.input_size)
        self._told = False  # of patches whose computation was not recorded

    def _build_chain(self) -> None:
        example = torch.zeros(2, *self.input_size, device=self.device)
        try:
            self.chain: Chain = build_chain(self.module, example, self.classifier, self.segments)
        except (RuntimeError, AssertionError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise BackboneError(
                f"{self.spec} does not run on images of shape {self.input_size}: {first_line(error)}. Expected a float32 "
                "network from one batch of RGB images to one tensor; preprocessing=... says another image size."
            ) from error
        self._checked_sizes = {self.preprocessing.image_size}  # a chain built anew has run no other

    def around(self, module: nn.Module, spec: str = "", arguments: dict[str, Any] | None = None) -> Self:
        """A backbone like this one around another module of the same structure, hashed and cut anew."""
        recorded = self.arguments if arguments is None else arguments
        return replace(self, module=module, spec=spec or self.spec, arguments=recorded, place=None)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) the backbone was made for."""
        return self.preprocessing.input_size

    @property
    def architecture(self) -> str | None:
        """timm's name of the network, under which a file of it is read again; None for one of another source."""
        name = getattr(self.module, "pretrained_cfg", {}).get("architecture")
        return name if isinstance(name, str) else None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all frozen tensors as they were when loaded, 64 hexadecimal digits."""
        return self.fingerprints.whole

    @property
    def identity(self) -> str:
        """The fingerprint and a digest of the operations, for results that are kept under what they depend on."""
        return f"{self.fingerprint} {digest_of(self.computing.record.description.model_dump())}"

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in self.module.parameters()), torch.device("cpu"))

    def to(self, device: str | torch.device) -> Self:
        """Move the frozen tensors to a device. Returns self."""
        there, held = torch.empty(0, device=device).device, (*self.module.parameters(), *self.module.buffers())
        if all(tensor.device == there for tensor in held):
            return self
        self.module.to(device)
        self._build_chain()
        self.computing.chain = self.chain
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The base's own logits (B, K) for normalised images (B, C, H, W)."""
        return self.module(images)

    def patched(self, patch: Any) -> Any:
        """The model of a `Patch`: a `PatchedModel`, which is an ordinary `nn.Module` from images (B, C, H, W) to answers.

        Raises `WrongBackboneError` for a patch of another backbone, `ForeignTensorError` for one whose tensors do
        not fit, `PatchError` for anything else than a patch.
        """
        if Backbone.patched_model is None:
            raise PatchError(f"{patch!r:.200} is not a patch. Expected a Patch, such as Patch.load(path).")
        return Backbone.patched_model(self, patch)

    @torch.no_grad()
    def check_image_size(self, pixels: int) -> None:
        """Run one blank image of `pixels` x `pixels` through the chain, unless that size was run before.

        Random state and buffers stay as they are. Raises `BackboneError` for a size out of range, and where the network
        takes no images of this size or gives other features for it.
        """
        if pixels in self._checked_sizes:
            return
        seen = self.preprocessing.with_image_size(pixels)
        if pixels > SIDES * self.preprocessing.image_size:
            raise BackboneError(
                f"images of {pixels} x {pixels} pixels are more than {SIDES} times as wide as those of {self.spec}, "
                f"{self.preprocessing.image_size} px, and cost more than {SIDES**2} times as much. "
                "Choose a smaller image size, or load the backbone with a preprocessing for larger images."
            )
        image = torch.zeros(1, *seen.input_size, device=self.device)
        try:
            width = self.chain(image).shape[-1]
            reason = f"it gives {width} features instead of {self.chain.feature_dim}"
        except (RuntimeError, AssertionError, TypeError, ValueError, LookupError) as error:
            width, reason = None, first_line(error)
        if width != self.chain.feature_dim:
            raise BackboneError(
                f"{self.spec} takes no images of {pixels} x {pixels} pixels ({reason}); it was loaded for "
                f"{self.preprocessing.image_size}. Leave the image size out, choose another, or load the backbone for it "
                f"(vision transformers of timm: with the argument img_size={pixels})."
            )
        self._checked_sizes.add(pixels)

    def check_computation(
        self, recorded: Computation | None, what: str, spec: str, arguments: Mapping[str, Any] | None = None
    ) -> None:
        """Raises `WrongBackboneError` where this network computes something else than was `recorded` with the same tensors.

        `what` was recorded, such as "this patch", for the network `spec` with these arguments. Without a record the backbone
        warns once that the computation cannot be checked.
        """
        if recorded is None:
            if not self._told:
                self._told = True
                warn_caller(
                    f"{what} was written before computations were recorded: its tensors are those of {self.spec}, but "
                    "whether it pads, activates and pools as the one that it was trained on could not be checked. "
                    "Record them with patch.on(backbone).save(path), once its answers are known to be right.",
                    UncheckedComputationWarning,
                )
            return
        if difference := self.computing.difference(recorded):
            theirs, ours = dict(arguments or {}), self.arguments
            given, own = (f" with {theirs}", f" with {ours}") if theirs != ours else ("", "")
            raise WrongBackboneError(
                f"{what} was made for {spec}{given}. {self.spec}{own} has the same tensors but computes something else: "
                f"{difference}.",
                "Load the backbone with the library and the arguments that it was made with.",
            )

    def verify(self) -> None:
        """Hash all frozen tensors again, and take the probes that were taken before.

        Raises `BackboneChangedError` naming the segments that moved, or what is computed differently.
        """
        self.verify_tensors()
        if self.computing.recorded and (
            changed := Computing(self.chain, self.input_size).difference(self.computing.record)
        ):
            raise BackboneChangedError(
                f"{self.spec} has its tensors but computes something else than when it was loaded: {changed}. Load it again; "
                "something outside this library changed its modules."
            )

    def verify_tensors(self) -> None:
        """Hash all frozen tensors again, as every fit does at its end. Raises `BackboneChangedError` for those that moved."""
        now = Fingerprint.of(self.chain)
        if now != self.fingerprints:
            pairs = zip(self.chain, self.fingerprints.segments, now.segments, strict=True)
            moved = [segment.name for segment, before, after in pairs if before != after]
            moved += ["tables that several segments read"] if not moved and now.chain != self.fingerprints.chain else []
            moved += ["head"] if now.head != self.fingerprints.head else []
            raise BackboneChangedError(
                f"the frozen tensors of {self.spec} have changed since it was loaded, in: {', '.join(moved)}. "
                "Load it again; something outside this library wrote to them."
            )

    def __repr__(self) -> str:
        return f"Backbone({self.spec!r}, {self.chain!r}, fingerprint {self.fingerprint[:12]})"
