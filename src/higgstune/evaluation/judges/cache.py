"""Judges whose answers are cached on disk, so that an evaluation that was interrupted resumes where it was."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from higgstune.checkpoint_files import sha256_of
from higgstune.evaluation.judges.base import Judges, QualityJudge, SpeakerJudge, Transcriber
from higgstune.files import write_file

_LOG = logging.getLogger(__name__)
_BATCH = 16  # files that a judge gets before its answers are saved


def cached(judges: Judges, folder: Path) -> Judges:
    """The same judges, with their answers cached in `folder` by judge, question and content of the files."""
    return Judges(
        None if judges.asr is None else _Transcriber(judges.asr, folder),
        None if judges.speaker is None else _Speaker(judges.speaker, folder),
        None if judges.quality is None else _Quality(judges.quality, folder),
    )


class _Answers:
    """The cached answers of one judge, in one file."""

    def __init__(self, folder: Path, judge: str) -> None:
        self.path = folder / f"{hashlib.sha256(judge.encode()).hexdigest()[:16]}.json"
        self.judge = judge

    def of(self, question: Any, files: Sequence[Path], judge: Callable[[Sequence[Path]], Sequence[Any]]) -> list[Any]:
        """One answer per file; `judge` answers for the files that are not cached."""
        known = self._read()
        keys = [hashlib.sha256(json.dumps([question, sha256_of(file)]).encode()).hexdigest() for file in files]
        missing = {key: file for key, file in zip(keys, files, strict=True) if key not in known}
        waiting = list(missing)
        for first in range(0, len(waiting), _BATCH):
            batch = waiting[first : first + _BATCH]
            known |= dict(zip(batch, judge([missing[key] for key in batch]), strict=True))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, json.dumps({"judge": self.judge, "answers": known}, ensure_ascii=False))
        return [known[key] for key in keys]

    def _read(self) -> dict[str, Any]:
        if not self.path.is_file():
            return {}
        try:
            answers: dict[str, Any] = dict(json.loads(self.path.read_text(encoding="utf-8"))["answers"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            _LOG.warning("%s is damaged (%s): the judge's answers are computed anew", self.path, error)
            return {}
        return answers


class _Transcriber:
    def __init__(self, judge: Transcriber, folder: Path) -> None:
        self.judge = judge
        self.name = judge.name
        self.answers = _Answers(folder, judge.name)

    def transcribe(
        self, files: Sequence[Path], *, language: str | None = None, seconds: float | None = None
    ) -> list[str]:
        return self.answers.of(
            ["text", language, seconds],
            files,
            lambda some: self.judge.transcribe(some, language=language, seconds=seconds),
        )


class _Speaker:
    def __init__(self, judge: SpeakerJudge, folder: Path) -> None:
        self.judge = judge
        self.name = judge.name
        self.answers = _Answers(folder, judge.name)

    def similarities(self, references: Sequence[Path], files: Sequence[Path]) -> dict[str, list[float]]:
        question = ["similarity", sorted(sha256_of(path) for path in references)]
        return _by_model(
            self.answers.of(question, files, lambda some: _by_file(self.judge.similarities(references, some)))
        )


class _Quality:
    def __init__(self, judge: QualityJudge, folder: Path) -> None:
        self.judge = judge
        self.name = judge.name
        self.answers = _Answers(folder, judge.name)

    def rate(self, files: Sequence[Path]) -> dict[str, list[float]]:
        return _by_model(self.answers.of(["quality"], files, lambda some: _by_file(self.judge.rate(some))))


def _by_file(numbers: dict[str, list[float]]) -> list[dict[str, float]]:
    return [dict(zip(numbers, values, strict=True)) for values in zip(*numbers.values(), strict=True)]


def _by_model(answers: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [answer[name] for answer in answers] for name in (answers[0] if answers else {})}
