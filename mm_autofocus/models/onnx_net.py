"""A net in an ONNX file: one session of ONNX Runtime, its card, and its two halves.

A file may hold two nets beside each other, one from patches to defocus and one from the
mosaic to importance. ONNX Runtime computes both in every run, whatever outputs are asked
for (``only_execute_path_to_fetches`` saves nothing in 1.31), so the half that is not wanted
is fed an empty batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.models.card import KEY, ModelCard, read_sidecar, sidecar_of
from mm_autofocus.models.patches import CELL_PX
from mm_autofocus.models.sealing import verify
from mm_autofocus.registry import suggest

if TYPE_CHECKING:
    import numpy.typing as npt

    Real: TypeAlias = npt.NDArray[np.float32]

__all__ = ["PROVIDERS", "OnnxFile", "OnnxNet", "available_providers"]

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
"""Our word for each provider of ONNX Runtime."""

# On a CPU a small batch stays in the cache; a GPU wants all patches at once.
_CPU_BATCH = 4


def available_providers() -> list[str]:
    """Names of the providers that this installation of ONNX Runtime has."""
    import onnxruntime as ort

    there = ort.get_available_providers()
    return [name for name, full in PROVIDERS.items() if full in there]


class OnnxFile:
    """One session, its card, and its checksum.

    Parameters
    ----------
    source : Path | str | bytes
        The file, or what it holds.
    card : ModelCard | None
        None: the one beside the file, or inside it.
    providers : sequence of str | None
        Keys of `PROVIDERS`; None: ``cpu``.
    threads : int
        Threads of one run.

    Attributes
    ----------
    card : ModelCard
        Its card.
    path : Path | None
        The file; None if it was given as bytes.
    size : int
        Of the file, in bytes.

    Raises
    ------
    InputError
        See `mm_autofocus.models.runtime.OnnxModel`.
    """

    def __init__(
        self,
        source: Path | str | bytes,
        card: ModelCard | None = None,
        *,
        providers: Sequence[str] | None = None,
        threads: int = 1,
    ) -> None:
        import onnxruntime as ort

        chosen = _providers(providers)
        if threads < 1:
            raise InputError(f"threads: {threads} is not allowed: must be at least 1")
        path = None if isinstance(source, bytes) else Path(source)
        self.what = "model" if path is None else f"model {path}"
        data = source if isinstance(source, bytes) else _read(Path(source))
        self.path, self.size = path, len(data)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong is raised, and said once
        # A thread that spins while it waits takes the core that the camera needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(
                data, options, providers=[PROVIDERS[name] for name in chosen]
            )
        except Exception as e:  # noqa: BLE001 -- its errors share no base
            why = str(e).strip().splitlines()[0][:160]
            raise InputError(
                f"{self.what}: is damaged or no ONNX file that this ONNX Runtime reads ({why})"
            ) from None
        if self.providers[0] != chosen[0]:  # it falls back by itself, and says so to no one
            raise InputError(
                f"providers: {chosen[0]!r} could not be started (its driver or libraries are "
                f"missing); {', '.join(self.providers)} would be used instead"
            )
        self.card = self._card(card, path, data)
        self._bind()

    @property
    def providers(self) -> list[str]:
        """Those in use."""
        names = {full: name for name, full in PROVIDERS.items()}
        return [names.get(p, p) for p in self._session.get_providers()]

    def _bind(self) -> None:
        """Find what the card names; a subclass knows what that is."""

    def _run(self, names: Sequence[str], feeds: dict[str, Real]) -> list[Any]:
        try:
            return list(self._session.run(list(names), feeds))
        except Exception as e:  # noqa: BLE001 -- its errors share no base
            why = " ".join(str(e).split())[:200]
            raise InputError(f"{self.what}: cannot be run as its card says ({why})") from None

    def _card(self, card: ModelCard | None, path: Path | None, data: bytes) -> ModelCard:
        """The card given, or beside the file, or inside it; and the checksum."""
        text = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        inside = False
        if card is None and path is not None and sidecar_of(path).exists():
            card = read_sidecar(sidecar_of(path))
        if card is None:
            if text is None:
                beside = "MODEL.card.yaml" if path is None else sidecar_of(path).name
                raise InputError(
                    f"{self.what}: has no card; write one by hand in {beside} beside it, or "
                    "name one"
                )
            card, inside = ModelCard.from_json(text, where=f"{self.what}: card"), True
        verify(data, card, inside=inside, what=self.what)
        return card

    def _check_names(
        self, wanted: dict[str, str | None], there: Sequence[str], kind: str
    ) -> None:
        """Refuse a net that lacks an input or an output that its card names."""
        for key, name in wanted.items():
            if name is not None and name not in there:
                raise InputError(
                    f"{self.what}: card.{key}: the net has no {kind} {name!r}; it has: "
                    f"{', '.join(there)}"
                )

    def _check_task(self, task: str) -> None:
        """Refuse a model that answers another question."""
        if self.card.task != task:
            does = {"defocus": "tells the defocus", "refocus": "recovers the sharp image"}
            raise InputError(
                f"{self.what}: {does[self.card.task]}; here one is needed that {does[task]}"
            )


class OnnxNet(OnnxFile):
    """A net that tells the defocus.

    Parameters and errors are those of `OnnxFile`.

    Attributes
    ----------
    batch : int | None
        Patches per run; None: all at once.
    lens : numpy.ndarray | None
        ``(numbers,)`` that the net is told of the lens; None: what the file holds.
    """

    lens: Real | None = None

    def patches(self, x: Real) -> tuple[Real, Real | None]:
        """Answers ``(N,)`` and standard deviations for patches ``(N, C, P, P)``."""
        names = [n for n in (self._defocus, self._sd) if n is not None]
        x = self._laid(x)
        n = len(x)
        step = self.batch or n
        parts: list[list[Real]] = []
        for k in range(0, n, step):
            part = x[k : k + step]
            real = len(part)
            if self._fixed_batch and real < step:
                part = np.concatenate([part, np.repeat(part[-1:], step - real, axis=0)])
            feeds = {self._patch_input: part}
            if self._mosaic_input is not None:
                feeds[self._mosaic_input] = self._no_mosaic
            if self.lens is not None and self.card.lens is not None:
                feeds[self.card.lens.input] = self.lens[None]
            out = self._run(names, feeds)
            parts.append(
                [
                    self._column(answer, len(part), name)[:real]
                    for answer, name in zip(out, names, strict=True)
                ]
            )
        columns = [np.concatenate(c) for c in zip(*parts, strict=True)]
        return columns[0], columns[1] if len(columns) > 1 else None

    def importance(self, mosaic: Real) -> Real:
        """Importance ``(rows, columns)`` for a mosaic ``(1, C, rows · 56, columns · 56)``."""
        rule = self.card.importance
        if rule is None:
            raise InputError(f"{self.what}: has no importance net")
        feeds = {rule.input: mosaic, self._patch_input: self._no_patches}
        out = np.asarray(self._run([rule.output], feeds)[0], np.float32)
        cells = tuple(s // CELL_PX for s in mosaic.shape[2:])
        if out.size != cells[0] * cells[1]:
            raise InputError(
                f"{self.what}: importance has the shape {out.shape}, which is not allowed: "
                f"must be (1, {cells[0]}, {cells[1]})"
            )
        return out.reshape(cells)

    def _laid(self, x: Real) -> Real:
        if self.card.inputs.layout == "NHWC":
            return np.ascontiguousarray(np.moveaxis(x, 1, -1))
        return x

    def _column(self, answer: Any, n: int, name: str) -> Real:
        array = np.asarray(answer, np.float32)
        if array.shape not in {(n,), (n, 1)}:
            raise InputError(
                f"{self.what}: output {name!r} has the shape {array.shape}, which is not "
                f"allowed: must be ({n},) or ({n}, 1) for {n} patches"
            )
        return array.reshape(n)

    def _bind(self) -> None:
        """Find the inputs and outputs that the card names, and what the idle half is fed."""
        self._check_task("defocus")
        self.batch: int | None = _CPU_BATCH if self.providers == ["cpu"] else None
        card, rule = self.card, self.card.importance
        inputs = {i.name: i for i in self._session.get_inputs()}
        outputs = [o.name for o in self._session.get_outputs()]
        self._patch_input = card.inputs.name
        self._mosaic_input = None if rule is None else rule.input
        self._defocus = card.outputs.defocus
        self._sd = card.outputs.sd
        # a hand-written card that says nothing of an sd does not ask for one
        if self._sd not in outputs and "sd" not in card.outputs.model_fields_set:
            self._sd = None
        wanted_in = {"inputs.name": self._patch_input, "importance.input": self._mosaic_input}
        wanted_out = {
            "outputs.defocus": self._defocus,
            "outputs.sd": self._sd,
            "importance.output": None if rule is None else rule.output,
        }
        if card.lens is not None:
            own = [i.name for i in self._session.get_overridable_initializers()]
            self._check_names({"lens.input": card.lens.input}, own, "input with a usual value")
        self._check_names(wanted_in, list(inputs), "input")
        self._check_names(wanted_out, outputs, "output")
        if unknown := set(inputs) - set(wanted_in.values()):
            raise InputError(
                f"{self.what}: the net has an input {min(unknown)!r} of which its card says "
                "nothing"
            )
        patch = (card.planes, card.patch_px, card.patch_px)
        batch = self._fits(inputs[self._patch_input], patch, card.inputs.layout)
        self._fixed_batch = isinstance(batch, int)
        self.batch = batch if isinstance(batch, int) else self.batch
        self._no_patches = self._laid(np.zeros((batch or 1, *patch), np.float32))
        self._no_mosaic = np.zeros((1, card.planes, CELL_PX, CELL_PX), np.float32)
        if rule is not None:
            side = (card.planes, None, None)
            first = self._fits(inputs[rule.input], side, "NCHW")
            self._find_empty(free_patches=batch is None, free_mosaic=first is None)

    def _fits(self, given: Any, shape: tuple[int | None, ...], layout: str) -> int | None:
        """Refuse an input that does not take ``shape``; return its batch, None: any."""
        own = [d if isinstance(d, int) and d > 0 else None for d in given.shape]
        expected: list[int | None] = [None, *shape]
        if layout == "NHWC":
            expected = [None, *shape[1:], shape[0]]
        off = len(own) != 4 or any(
            a is not None and b is not None and a != b
            for a, b in zip(own, expected, strict=False)
        )
        if off or given.type != "tensor(float)":
            text = " × ".join("any" if d is None else str(d) for d in expected)
            card = self.card
            raise InputError(
                f"{self.what}: input {given.name!r} is {given.type} {given.shape}, but its "
                f"card ({card.n_looks} looks, {card.channels} channels, {layout}, patches of "
                f"{card.patch_px}) asks for float {text}"
            )
        return own[0]

    def _find_empty(self, *, free_patches: bool, free_mosaic: bool) -> None:
        """Feed the idle half nothing at all, where the net bears it."""
        rule = self.card.importance
        if rule is None:
            return
        trials = (
            (free_patches, "_no_patches", rule.output),
            (free_mosaic, "_no_mosaic", self._defocus),
        )
        for free, attribute, output in trials:
            if not free:
                continue
            usual = getattr(self, attribute)
            setattr(self, attribute, usual[:0])
            feeds = {rule.input: self._no_mosaic, self._patch_input: self._no_patches}
            if attribute == "_no_mosaic":
                feeds[self._patch_input] = self._one_patch()
            try:
                self._run([output], feeds)
            except InputError:
                setattr(self, attribute, usual)

    def _one_patch(self) -> Real:
        card = self.card
        return self._laid(np.zeros((1, card.planes, card.patch_px, card.patch_px), np.float32))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"model: {path} does not exist") from None
    except OSError as e:
        raise InputError(f"model: {path} cannot be read ({e.strerror})") from None


def _providers(names: Sequence[str] | None) -> list[str]:
    """The providers to use, refusing one that is not known or not there."""
    names = list(names or ("cpu",))
    there = available_providers()
    for name in names:
        if name not in PROVIDERS:
            raise InputError(
                f"providers: {name!r} is unknown{suggest(name, PROVIDERS)}; allowed: "
                f"{', '.join(PROVIDERS)}"
            )
        if name not in there:
            raise InputError(
                f"providers: {name!r} is not there; this ONNX Runtime has: {', '.join(there)}"
            )
    return names
