"""One Mask: training and judging a mask that undoes edits, and looking for edits in a model's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mega_core.events import Reporter, silent
from mega_core.service.core import memory_errors

if TYPE_CHECKING:
    from mega_core.mask_study import Evaluation
    from mega_core.masking.detect import Detection
    from mega_core.masking.masks import Mask
    from mega_core.service.core import Core


class Masks:
    """Masks over edited weights, and the detector."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def train(
        self,
        model: str,
        method: str,
        n: int,
        out: Path,
        *,
        layer: int | None = None,
        together: bool = False,
        settings: str = "top",
        pruned: float = 0.10,
        epochs: int | None = None,
        params: Mapping[str, object] | None = None,
        seed: int = 0,
        report: Reporter = silent,
    ) -> Mask:
        """Edit `n` facts, train one mask that undoes the edits, and write it to the file `out`."""
        entry, chosen = self._core.asked(model, method, (), seed)
        with self._core.held(entry.ref(), report) as lm:
            from mega_core import mask_study

            plan = mask_study.Plan(chosen.name, n, seed=seed, together=together, given=tuple((params or {}).items()))
            training = mask_study.settings_of(settings, pruned, epochs)
            mask = mask_study.train_mask(lm, plan, entry.defaults.get(method, {}), layer, training, report)
            mask.save(out)
        return mask

    def evaluate(self, mask: Path, n: int = 100, report: Reporter = silent) -> Evaluation:
        """Judge a mask file on edits that it has not seen, beside its controls."""
        self._core.pool()  # sets up what the next line imports
        from mega_core.masking.masks import Mask

        found = Mask.load(mask)
        entry = self._core.settings.model(found.model)
        with self._core.held(entry.ref(), report) as lm:
            from mega_core import mask_study

            return mask_study.evaluate_mask(lm, found, entry.defaults, n, report)

    def detect(
        self,
        folder: Path,
        reference: str | None = None,
        mask: Path | None = None,
        prompts: Sequence[str] = (),
        report: Reporter = silent,
    ) -> Detection:
        """Look for knowledge edits in a model's folder, against a catalogue model or another folder if one is named."""
        self._core.pool()  # sets up what the next line imports
        from mega_core.masking.detect import detect_folder

        with memory_errors():
            return detect_folder(folder, self._core.settings, reference, mask, prompts, report)
