"""Work for engines that needs no model, and an ASR that kills the process that it is in."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from raw_recordings import KnowingAsr, Talk

from higgstune.errors import DataError
from higgstune.evaluation.judges.base import Transcript
from higgstune.raw.engines import work_folder


@dataclass
class Notes:
    """Notes who has worked on which file; what a file says in its first word is done to its process."""

    folder: Path
    device: str = "cpu"
    models: list[str] = field(default_factory=lambda: ["loaded"])

    def do(self, path: Path, report: Callable[[float], None]) -> str | None:
        """As the file says."""
        with work_folder(self.folder / f"{path.name}.part") as folder:
            (folder / "temporary").write_text("")
            with open(self.folder / f"{path.name}.log", "a") as log:
                log.write(f"{os.getpid()}\n")
            report(0.5)
            what, *more = path.read_text().split() or ["nothing"]
            tries = len((self.folder / f"{path.name}.log").read_text().split())
            if what == "die" and tries <= int(more[0]):
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "wait":
                time.sleep(float(more[0]))
            if what == "raise":
                raise DataError("the disk is on fire")
            if what == "break":
                raise ZeroDivisionError("by nothing")
            if what == "refuse":
                return "it is bad"
            (self.folder / f"{path.name}.part").write_text("done")
        return None

    def unload(self) -> None:
        """Other processes load them."""
        self.models = []


class DyingAsr(KnowingAsr):
    """One process that has it is killed in its second stretch; writes down how many clips all have transcribed."""

    def __init__(self, folder: Path, *talks: Talk) -> None:
        super().__init__(*talks)
        self.folder = folder

    def transcribe_clips(self, waveforms: Sequence[np.ndarray], language: str | None = None) -> list[Transcript]:
        """The texts, or the end."""
        with open(self.folder / "transcribed", "a") as log:
            log.write(f"{len(waveforms)}\n")
        if self.clips:
            with suppress(FileExistsError):
                os.close(os.open(self.folder / "died", os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
        return super().transcribe_clips(waveforms, language)
