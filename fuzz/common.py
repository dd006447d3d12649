"""What the fuzzers share: running libFuzzer on generated seeds, in a private folder in memory, and odd values."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))  # hostile_input.py: the tests' own checks


def scratch() -> Path:
    """An empty folder, in memory if the system has /dev/shm; `fuzz` removes it."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="higgstune-fuzz-", dir=memory if memory.is_dir() else None))


def fuzz(target: Callable[[bytes], None], seeds: Iterable[bytes], words: Iterable[str], folder: Path) -> None:
    """Run libFuzzer on a target with the arguments of the command line, and end with its exit code.

    It never returns, so a child runs it, and this process removes `folder` afterwards. Files among the arguments are
    inputs to try once, such as a finding.
    """
    if child := os.fork():
        try:
            _, status = os.waitpid(child, 0)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        sys.exit(abs(os.waitstatus_to_exitcode(status)))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    dictionary = folder / "words"
    dictionary.write_text("".join(f'"{_escaped(word)}"\n' for word in sorted(set(words))), encoding="ascii")
    tries = any(Path(argument).is_file() for argument in sys.argv[1:])
    atheris.Setup(sys.argv if tries else [*sys.argv, f"-dict={dictionary}", str(corpus)], target)
    atheris.Fuzz()


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode())


def odd_value(data: atheris.FuzzedDataProvider, names: list[str], depth: int = 0) -> object:
    """A value of JSON or YAML, of names that the readers know and of odd ones."""
    kind = data.ConsumeIntInRange(0, 9 if depth < 4 else 6)
    if kind == 0:
        return data.PickValueInList(names)
    if kind == 1:
        return data.ConsumeUnicode(12)
    if kind == 2:
        return data.ConsumeIntInRange(-4, 40)
    if kind == 3:
        return data.PickValueInList([0, 1, -1, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400])
    if kind == 4:
        return data.ConsumeFloat()
    if kind == 5:
        return data.PickValueInList([None, True, False, "", 0.0, 0.4, 1e308, -0.0])
    if kind == 6:
        return data.ConsumeUnicodeNoSurrogates(40)
    items = range(data.ConsumeIntInRange(0, 4))
    if kind == 7:
        return [odd_value(data, names, depth + 1) for _ in items]
    return {str(odd_key(data, names)): odd_value(data, names, depth + 1) for _ in items}


def odd_key(data: atheris.FuzzedDataProvider, names: list[str]) -> str:
    """A key: mostly one that is known."""
    return data.ConsumeUnicodeNoSurrogates(8) if data.ConsumeProbability() < 0.1 else data.PickValueInList(names)


def damaged(data: atheris.FuzzedDataProvider, whole: object, names: list[str], depth: int = 0) -> object:
    """A copy of plain data with some of its values and keys replaced, added or dropped."""
    chance = data.ConsumeProbability()
    if chance < 0.06 and depth:
        return odd_value(data, names, depth)
    if isinstance(whole, dict):
        copy = {key: damaged(data, value, names, depth + 1) for key, value in whole.items()}
        if chance > 0.9:
            copy[odd_key(data, names)] = odd_value(data, names, depth)
        if copy and 0.85 < chance < 0.9:
            copy.pop(data.PickValueInList(list(copy)))
        return copy
    if isinstance(whole, list):
        return [damaged(data, value, names, depth + 1) for value in whole]
    return whole
