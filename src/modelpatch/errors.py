"""Errors and warnings for users. Each message says what was given, what was expected and what to do."""

import importlib
import sys
import warnings
from typing import Any


class ModelpatchError(Exception):
    """The base class of all errors that this library raises on purpose.

    `detail` says what happened, and `advice`, which may be empty, what to do. The message is both.
    """

    def __init__(self, detail: str = "", advice: str = "") -> None:
        super().__init__(f"{detail} {advice}".strip())
        self.detail, self.advice = detail, advice


class BackboneError(ModelpatchError):
    """A backbone could not be loaded, cut into a chain or verified."""


class UnknownBackboneError(BackboneError):
    """The specification names no backbone that can be built here."""


class UntraceableBackboneError(BackboneError):
    """The network cannot be cut into a chain that computes exactly what the network computes."""


class BackboneChangedError(BackboneError):
    """The frozen tensors of a backbone are no longer the ones that were loaded."""


class PatchError(ModelpatchError):
    """A patch cannot be read, bound or written."""


class PatchFileError(PatchError):
    """A file cannot be trusted to be the patch that was written."""


class CheckpointError(BackboneError, PatchError):
    """A checkpoint cannot be read, or its tensors are not those of the network."""


class NotAPatchError(PatchFileError):
    """The file is not a patch file at all."""


class PatchLengthError(PatchFileError):
    """The file is shorter or longer than its own header says: truncated or padded."""


class DamagedPatchError(PatchFileError):
    """The bytes differ from the bytes that were written: the hash in the file does not match."""


class UnknownPatchVersionError(PatchFileError):
    """The file was written by a newer format version than this library reads."""


class HostileNameError(PatchFileError):
    """A tensor, class or task name holds characters that no writer of this library produces."""


class NonFiniteTensorError(PatchFileError):
    """A tensor holds NaN or infinity."""


class InvalidPatchError(PatchFileError):
    """The header is intact but describes something that cannot be a patch."""


class SignatureError(PatchFileError):
    """The author of a file is not known, or cannot be checked."""


class UnsignedPatchError(SignatureError):
    """A signature is required, and the file has none."""


class OtherSignerError(SignatureError):
    """The file is signed by somebody else than those whose signature is required."""


class DamagedSignatureError(SignatureError):
    """A signature was altered, is of other bytes, or is none at all."""


class WrongBackboneError(PatchError):
    """The patch was made for other frozen weights than the backbone at hand."""


class ForeignTensorError(PatchError):
    """The patch holds tensors whose names or shapes the backbone does not have."""


class AddedModulesError(ForeignTensorError):
    """Modules that a patch adds, which cannot be built for its segments or cannot run there."""


class UnknownGraftError(PatchError):
    """The patch adds a kind of module this installation does not know."""


class CascadeError(PatchError):
    """Patches cannot be the stages of one cascade, or a cascade cannot be made or written."""


class CascadeFileError(CascadeError):
    """A file is no cascade, is damaged, or its patches are not those it was made of."""


class StoreError(ModelpatchError):
    """A store of patches cannot be read or written."""


class InvalidReferenceError(StoreError):
    """A name, tag or reference that no store can hold."""


class UnknownPatchError(StoreError):
    """A name, tag or version that the store does not have."""


class TaggedVersionError(StoreError):
    """A version that a tag names was to be removed."""


class OtherBackboneError(StoreError):
    """A patch of another backbone than the other versions of its name was to be published without saying so."""


class MethodError(ModelpatchError):
    """A method is unknown, misconfigured or cannot be applied to the backbone."""


class MethodNotApplicableError(MethodError):
    """The backbone has nothing that the method could train."""


class DataError(ModelpatchError):
    """A data set cannot be read as the task that was asked for."""


class TrainingError(ModelpatchError):
    """Training cannot start, continue or resume."""


class DivergedError(TrainingError):
    """The loss is no longer a finite number."""


class CheckpointMismatchError(TrainingError):
    """A checkpoint or a patch's file belongs to a run with other settings."""


class TrainingWarning(UserWarning):
    """A run that will end, but not as its user means it to."""


class UncheckedComputationWarning(UserWarning):
    """A patch whose file does not say what its backbone computes: its tensors were compared, nothing else."""


class DataWarning(UserWarning):
    """A part of the data was not read that its user may miss: rows without a picture, boxes without area, left-out folders."""


class DepthWarning(UserWarning):
    """Pictures of more than 8 bits whose values do not fill the range that they are taken to have."""


class CheckpointWarning(UserWarning):
    """A checkpoint holds more than the network that is read from it."""


class KeyFileError(ModelpatchError):
    """A key to sign with, or to check signatures with, cannot be read."""


class LockedKeyError(KeyFileError):
    """A private key that only another passphrase opens."""


class UnknownTaskError(ModelpatchError):
    """A task name that no loaded patch has."""


class BudgetError(ModelpatchError):
    """A request does not fit into the allowed memory."""


class EngineError(ModelpatchError):
    """An engine is asked for something it cannot do with the images or patches at hand."""


class ConfigError(ModelpatchError):
    """A file of options cannot be read, or holds options that the verb does not have."""


class ServeError(ModelpatchError):
    """A server cannot start, answer or be reached."""


class MissingExtraError(ModelpatchError):
    """An optional library is needed for what was asked."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs `{library}`, which is not installed. Run: pip install 'modelpatch[{extra}]'")


def require(module: str, extra: str, purpose: str, library: str = "") -> Any:
    """Import an optional module, of a library of that name or another. Raises `MissingExtraError` where there is none."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(library or module, extra, purpose) from None


def warn_caller(
    text: str,
    category: type[Warning] = TrainingWarning,
    inside: tuple[str, ...] = ("modelpatch.", "torch.", "contextlib", "functools"),
) -> None:
    """Warn at the line that called into the library: the innermost outside of modules whose names begin so."""
    frame: Any = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(inside):
        frame = frame.f_back
    warnings.warn_explicit(
        text,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__"),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )
