"""The computation of a network beside its tensors, as patch files record it: probes, which decide, and a description in words.

The same weights in another computation (padding, activation, epsilon, pooling) have the same content hash. `Computation` is
what was recorded, `Computing` what a loaded chain computes, measured when it is first asked for.
"""

import base64
import threading
from collections.abc import Sequence
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import BaseModel, Field, field_validator

from modelpatch.backbone.chain import Chain
from modelpatch.backbone.operations import Description, tell
from modelpatch.backbone.probe import REFUSALS, WIDTH, Probe
from modelpatch.text import first_line

SIDES = 8  # times the side that a network was made for: the largest pictures it is given
LOCK = threading.Lock()  # a probe takes all processors, and several threads may bind their first patches: one at a time
PACKED = 4 * -(-4 * WIDTH // 3)  # characters of base64


class ProbeRecord(BaseModel, frozen=True, extra="forbid"):
    """A probe in a patch file: `values` are float32, little-endian, in base64, `error` the rounding of the network."""

    pixels: int = Field(gt=0, le=2**13)
    values: Annotated[str, Field(max_length=PACKED)]
    error: float = Field(ge=0, allow_inf_nan=False)
    lifted: bool = False
    loud: bool = False

    @field_validator("values")
    @classmethod
    def _finite(cls, values: str) -> str:
        packed = base64.b64decode(values.encode(), validate=True)  # a ValueError where it is none
        if not packed or len(packed) % 4 or not np.isfinite(np.frombuffer(packed, "<f4")).all():
            raise ValueError("the values of a probe are finite float32 numbers in base64")
        return values

    @classmethod
    def of(cls, probe: Probe) -> Self:
        """The record of a probe."""
        packed = base64.b64encode(probe.values.astype("<f4").tobytes()).decode()
        return cls(pixels=probe.pixels, values=packed, error=probe.error, lifted=probe.lifted, loud=probe.loud)

    @property
    def look(self) -> tuple[int, bool, bool]:
        """The picture and the network that it was taken of: pixels, lifted, loud."""
        return self.pixels, self.lifted, self.loud

    @property
    def probe(self) -> Probe:
        """The probe, its values rounded to float32."""
        values = np.frombuffer(base64.b64decode(self.values), "<f4").astype(np.float64)
        return Probe(self.pixels, values, self.error, self.lifted, self.loud)


class Computation(BaseModel, frozen=True, extra="forbid"):
    """The computation of a network: probes at its own size and, if it takes one, at another, and its operations in words."""

    probes: Annotated[tuple[ProbeRecord, ...], Field(min_length=1, max_length=4)]
    description: Description

    def difference(self, other: Self, names: Sequence[str] = ()) -> str:
        """The difference of another record of the same tensors in words; empty where no probe of both tells them apart.

        `names` are those of the segments.
        """
        theirs = {record.look: record.probe for record in other.probes}
        for record in self.probes:
            if record.look in theirs and (found := compare(record.probe, theirs[record.look])):
                segments = names or [f"segment {number}" for number in range(len(self.description.segments))]
                told = tell(self.description.differences(other.description, segments))
                return f"{told} ({found})" if told else found
        return ""


def compare(expected: Probe, found: Probe) -> str:
    """The difference of two probes of one size in words; empty where rounding explains it."""
    distance, tolerance = expected.distance(found), max(expected.tolerance, found.tolerance)
    if distance <= tolerance:
        return ""
    unit = expected.largest or 1.0
    return (
        f"features of {expected.pixels} px differ by {distance / unit:.2g} of the largest, rounding explains "
        f"{tolerance / unit:.1g}"
    )


class Computing:
    """The computation of a chain for images of `shape` (C, H, W). Every probe is taken once, when it is asked for."""

    def __init__(self, chain: Chain, shape: tuple[int, int, int]) -> None:
        self.chain, self.shape = chain, shape
        self._probes: dict[tuple[int, bool, bool], Probe | str] = {}
        self._record: Computation | None = None

    def probe(self, pixels: int, lifted: bool = False, loud: bool = False) -> Probe | str:
        """The probe at a size, or why the network gives none."""
        if pixels > SIDES * self.shape[1]:
            return f"{pixels} px are more than {SIDES} times its own {self.shape[1]}"
        with LOCK:
            look = pixels, lifted, loud
            if look not in self._probes:
                try:
                    self._probes[look] = Probe.take(self.chain, self.shape[0], *look)
                except REFUSALS as error:
                    self._probes[look] = first_line(error)
            return self._probes[look]

    @property
    def recorded(self) -> bool:
        """True if the record was asked for before."""
        return self._record is not None

    @property
    def record(self) -> Computation:
        """The record for patch files."""
        if self._record is None:
            own = self.shape[1]
            others = (self.probe(pixels) for pixels in (own + 32, own + 28, 2 * own, own // 2) if pixels)
            other = next((probe for probe in others if isinstance(probe, Probe)), None)
            lifted = self.probe(other.pixels if other else own, lifted=True)
            taken = (self.probe(own), other, lifted, self.probe(own, loud=True))
            records = tuple(ProbeRecord.of(probe) for probe in taken if isinstance(probe, Probe))
            self._record = Computation(probes=records, description=self.describe())
        return self._record

    def describe(self) -> Description:
        """The operations in words."""
        device = next((tensor.device for segment in self.chain for _, tensor in segment.named_tensors()), None)
        return Description.of(self.chain, torch.zeros(1, *self.shape, device=device))

    def difference(self, recorded: Computation) -> str:
        """The difference of what this chain computes from what was recorded, in words; empty where there is none."""
        for record in recorded.probes:
            found = self.probe(*record.look)
            if isinstance(found, str):
                told = tell(recorded.description.differences(self.describe(), self.chain.names))
                return (
                    f"{told or 'its operations'} (it takes no images of {record.pixels} px, as the other does: {found})"
                )
            if compare(record.probe, found):
                own = Computation(probes=(ProbeRecord.of(found),), description=self.describe())
                return recorded.difference(own, self.chain.names)
        return ""
