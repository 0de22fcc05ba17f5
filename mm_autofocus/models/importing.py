"""Models by name, by path, or as a Python object: one door for all of them.

Names are those of the shipped files in ``models/weights`` and those of third parties (entry
points of the group ``mm_autofocus.models``, `mm_autofocus.registry.MODELS`); what the package
ships cannot be replaced unnoticed by a plug-in.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mm_autofocus.errors import InputError
from mm_autofocus.models.card import ModelCard, read_sidecar
from mm_autofocus.registry import MODELS, suggest

if TYPE_CHECKING:
    from mm_autofocus.models.refocus import RefocusModel
    from mm_autofocus.models.runtime import FocusModel
    from mm_autofocus.types import Image, Optics

__all__ = [
    "WEIGHTS",
    "check_against",
    "load_any",
    "load_model",
    "load_refocus_model",
    "model_names",
    "onnx_of",
    "shipped_models",
]

WEIGHTS = Path(__file__).parent / "weights"
"""Where the shipped models lie, ``NAME.onnx``."""

# A drive letter is one letter, a module is not.
_OBJECT = re.compile(r"[A-Za-z_][\w.]+:[A-Za-z_][\w.]*")


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.stem for p in WEIGHTS.glob("*.onnx"))


def model_names() -> list[str]:
    """All names that `load_model` takes: the shipped ones, then third parties'."""
    shipped = shipped_models()
    return [*shipped, *(n for n in MODELS.names() if n not in shipped)]


def load_model(
    name_or_path: str | Path,
    *,
    card: ModelCard | str | Path | None = None,
    providers: Sequence[str] | None = None,
    threads: int = 1,
) -> FocusModel:
    """Load a model, ready to predict.

    Parameters
    ----------
    name_or_path : str or Path
        A name of `model_names`; the path of an ONNX file; or ``"module:object"``: a
        function (see `mm_autofocus.models.runtime.CallableModel`), or an object with `card`
        and `predict`.
    card : ModelCard, str or Path, optional
        A card, or its file (YAML), instead of the one inside the model or beside it.
    providers : sequence of str, optional
        ``cpu``, ``cuda``, ``directml``, ``coreml``; None: ``cpu``.
    threads : int
        Threads of one prediction.

    Raises
    ------
    InputError
        No such model; it is damaged, has no card, or is not what the card says.
    """
    given = _card_of(card)
    file = _file_of(name_or_path)
    if file is not None:
        return _load_file(file, given, providers, threads)
    name = str(name_or_path)
    found = MODELS.get(name) if name in MODELS.names() else _import(name)
    if isinstance(found, str | Path):  # a plug-in that brings an ONNX file
        return _load_file(Path(found), given, providers, threads)
    model = _adopt(found, given, name)
    if model.card.task != "defocus":
        raise InputError(
            f"model: {name!r}: its card says {model.card.task!r}; only an ONNX file can be that"
        )
    return model


def load_refocus_model(
    name_or_path: str | Path,
    *,
    card: ModelCard | str | Path | None = None,
    providers: Sequence[str] | None = None,
    threads: int = 1,
) -> RefocusModel:
    """Load a model that recovers the sharp image.

    Parameters and errors are those of `load_model`, but that it must be an ONNX file.
    """
    from mm_autofocus.models.refocus import RefocusModel

    file = onnx_of(name_or_path)
    if file is None:
        raise InputError(
            f"model: {str(name_or_path)!r} is no ONNX file; a model that recovers the sharp "
            "image must be one"
        )
    return RefocusModel(file, _card_of(card), providers=providers, threads=threads)


def load_any(
    name_or_path: str | Path,
    *,
    card: ModelCard | str | Path | None = None,
    providers: Sequence[str] | None = None,
) -> FocusModel | RefocusModel:
    """Load a model, whatever its card says that it does."""
    from mm_autofocus.models.onnx_net import OnnxFile

    file, given = onnx_of(name_or_path), _card_of(card)
    load: Any = load_model
    if file is not None and OnnxFile(file, given).card.task == "refocus":
        load = load_refocus_model
    return cast(
        "FocusModel | RefocusModel", load(name_or_path, card=given, providers=providers)
    )


def _card_of(card: ModelCard | str | Path | None) -> ModelCard | None:
    return read_sidecar(Path(card).expanduser()) if isinstance(card, str | Path) else card


def onnx_of(name_or_path: str | Path) -> Path | None:
    """The ONNX file that is meant, a third party's, too; None if it is an object."""
    file, name = _file_of(name_or_path), str(name_or_path)
    if file is None and name in MODELS.names():
        found = MODELS.get(name)
        file = Path(found) if isinstance(found, str | Path) else None
    return file


def check_against(
    card: ModelCard,
    optics: Optics | None = None,
    image: Image | None = None,
    *,
    max_value: float | None = None,
    looks: int | None = None,
) -> None:
    """Refuse a microscope whose frames the model cannot be shown.

    Parameters
    ----------
    card : ModelCard
        Of the model.
    optics : Optics, optional
        Of the microscope; its pixel size is compared.
    image : numpy.ndarray, optional
        A frame, ``(Y, X)`` or ``(Y, X, 3)``; its channels and size are compared.
    max_value : float, optional
        Value at which the camera saturates; its bit depth is compared.
    looks : int, optional
        How many looks the strategy takes.

    Raises
    ------
    InputError
        With what the model takes and what it was given.
    """
    if looks is not None and looks != card.n_looks:
        offsets = ", ".join(f"{o:+g}" for o in card.looks_um)
        raise InputError(
            f"model {card.name!r}: takes {card.n_looks} looks (at {offsets} µm), not {looks}"
        )
    pixel = None if optics is None else optics.pixel_size_um
    if image is not None:
        card.check_frame(image.shape, max_value=max_value, pixel_size_um=pixel)
    elif why := card.check_pixel_size(pixel):
        raise InputError(f"model {card.name!r}: {why}")


def _file_of(name_or_path: str | Path) -> Path | None:
    """The ONNX file that is meant; None if a third party's name or an object is."""
    name = str(name_or_path)
    if isinstance(name_or_path, str) and name in shipped_models():
        return WEIGHTS / f"{name}.onnx"
    path = Path(name_or_path).expanduser()
    if isinstance(name_or_path, Path) or path.suffix.lower() == ".onnx":
        return path
    if name in MODELS.names():
        return None
    if path.is_file():
        return path
    if _OBJECT.fullmatch(name):
        return None
    names = model_names()
    raise InputError(
        f"model: {name!r} is unknown{suggest(name, names)}; allowed: "
        f"{', '.join([*names, 'the path of an ONNX file', 'module:object'])}"
    )


def _load_file(
    path: Path, card: ModelCard | None, providers: Sequence[str] | None, threads: int
) -> FocusModel:
    from mm_autofocus.models.runtime import OnnxModel

    return OnnxModel(path, card, providers=providers, threads=threads)


def _import(target: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as e:
        raise InputError(f"model: {target!r}: there is no module {e.name!r}") from None
    except AttributeError:
        raise InputError(f"model: {target!r}: the module has no {attribute!r}") from None
    return found


def _adopt(found: Any, card: ModelCard | None, name: str) -> FocusModel:
    """Make a model of what an entry point or ``module:object`` gave."""
    from mm_autofocus.models.runtime import CallableModel

    if isinstance(found, type):
        found = found()
    if hasattr(found, "predict"):
        if not isinstance(getattr(found, "card", None), ModelCard):
            raise InputError(f"model: {name!r} has no card")
        return cast("FocusModel", found)
    if not callable(found):
        raise InputError(
            f"model: {name!r} is an object of type {type(found).__name__}; it must be a "
            "function of patches, an object with card and predict, or the path of an ONNX file"
        )
    if card is None and not isinstance(getattr(found, "card", None), ModelCard):
        raise InputError(
            f"model: {name!r} has no card; name the file of one with the key card (--card)"
        )
    return CallableModel(found, card)
