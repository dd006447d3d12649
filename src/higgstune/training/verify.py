"""Verifies that what was saved is what was trained: a fresh process loads the adapter onto a fresh base.

python -m higgstune.training.verify REQUEST.json     prints one JSON line
"""

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from higgstune.batch.collate import Batch
from higgstune.errors import HiggstuneError, VerificationError
from higgstune.families import family_of
from higgstune.model.adapter_folder import adapter_card
from higgstune.model.adapters import claimed_and_idle, load_adapter
from higgstune.model.load import load_model
from higgstune.training.distributed import Processes, embedding_and_heads, shard

# The largest difference of a logit in float32. In bfloat16 the mean difference: a logit of 8 has steps of 0.03 there,
# so one different rounding is allowed, many are not.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-4}
MARGIN = 100  # by so many tolerances an adapter moves the base's logits that has learned anything
_POSITIONS = 256  # labels of audio and of text whose logits are compared


@dataclass(frozen=True)
class Verification:
    """The result of a comparison; differences are measured as `TOLERANCE` says for the dtype."""

    dtype: str
    tolerance: float
    from_trained: float  # |fresh process - trained model|
    from_base: float  # |fresh process - base without adapter|
    modules: int = 0  # of the adapter
    idle: list[str] = field(default_factory=list)  # those whose output is the base's, although they were taught

    @property
    def passed(self) -> bool:
        """Equal to the trained model, in numbers."""
        return self.from_trained <= self.tolerance and not math.isnan(self.from_base)

    @property
    def changes_base(self) -> bool:
        """Whether the logits are clearly not the base's."""
        return self.from_base > MARGIN * self.tolerance


def probe_logits(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Audio logits [M, K * V] and text logits [N, vocab] where a batch has labels, float32 on the CPU."""
    model.eval()
    with torch.no_grad():
        logits = family_of(model).label_logits(model, batch, _POSITIONS, embedding_and_heads(model))
    return {key: value.float().cpu() for key, value in logits.items()}


def write_probe(batch: Batch, logits: dict[str, Tensor], path: Path) -> None:
    """Save a batch with the trained model's logits on it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**{k: v.contiguous() for k, v in batch.items()}, **logits}, path)


def verify_in_fresh_process(
    *,
    adapter: Path,
    checkpoint: str,
    revision: str | None,
    dtype: str,
    device: str,
    probe: Path,
    quantize: str | None = None,
    among: Processes | None = None,
) -> Verification:
    """Load base and adapter in a new process and compare with the probe. Raises VerificationError if it differs.

    The base is loaded as it was trained: a probe of a 4-bit base says nothing about a whole one. A base that was
    sharded is sharded in the same way: `among` all processes, each of which calls this.
    """
    request = {
        "adapter": str(adapter), "checkpoint": checkpoint, "revision": revision,
        "dtype": dtype, "device": device, "quantize": quantize, "probe": str(probe), "sharded": among is not None,
    }  # fmt: skip
    rank = 0 if among is None else among.rank
    path = probe.with_name(f"request-{rank}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(request, indent=2), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums of equal order
    if among is not None:
        # They meet at a port of their own, not at the launcher's.
        environment = {key: value for key, value in environment.items() if not key.startswith("TORCHELASTIC_")}
        environment["MASTER_PORT"] = str(among.broadcast(_free_port()))
    done = _run(path, environment)
    if done.returncode != 0:
        raise VerificationError(f"the adapter {adapter} could not be loaded in a fresh process:\n{done.stderr[-4000:]}")
    result = Verification(**json.loads(done.stdout.splitlines()[-1]))
    if not result.passed:
        raise VerificationError(_explain(result, adapter))
    return result


def _run(request: Path, environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Answer a request in a process that shares nothing with the trained model."""
    return subprocess.run(
        [sys.executable, "-m", "higgstune.training.verify", str(request)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def _explain(result: Verification, adapter: Path) -> str:
    if math.isnan(result.from_trained) or math.isnan(result.from_base):
        return f"the adapter {adapter} gives logits that are not numbers: training diverged; lower the learning rates"
    return (
        f"the adapter {adapter}, loaded in a fresh process, does not give the trained model's logits: they differ by "
        f"{result.from_trained:.2e}, more than {result.tolerance:.0e} ({result.dtype}). Something that was trained is "
        "not in the adapter; do not use it"
    )


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("", 0))
        port: int = bound.getsockname()[1]
        return port


def _compare(request: dict[str, Any]) -> Verification:
    probe = load_file(request["probe"])
    trained = {key: probe.pop(key) for key in ("audio_logits", "text_logits")}
    sharded, device = request.get("sharded", False), torch.device(request["device"])
    if sharded:
        Processes(cpu=device.type == "cpu")
    model = load_model(
        request["checkpoint"],
        revision=request["revision"],
        dtype=request["dtype"],
        device="cpu" if sharded else device,
        quantize=request["quantize"],
    )
    # Without the checksum: a change is to be found by its effect on the logits.
    adapted = load_adapter(model, Path(request["adapter"]), checksum=False)
    if sharded:
        shard(adapted, device)
    fresh = probe_logits(adapted, probe)
    with adapted.disable_adapter():
        base = probe_logits(adapted, probe)
    card = adapter_card(Path(request["adapter"]))
    claimed, idle = claimed_and_idle(adapted, probe, card, embedding_and_heads(adapted))
    dtype = request["dtype"]
    from_trained, from_base = difference(fresh, trained, dtype), difference(fresh, base, dtype)
    return Verification(dtype, TOLERANCE[dtype], from_trained, from_base, len(claimed), idle)


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor], dtype: str) -> float:
    """The largest (float32) or mean (bfloat16) difference, of audio or text logits, whichever is larger."""
    gaps = [(a[key] - b[key]).abs() for key in a if a[key].numel()]
    return max((gap.max() if dtype == "float32" else gap.mean()).item() for gap in gaps)


def main(request: str) -> None:
    """Answer a request on stdout."""
    try:
        compared = _compare(json.loads(Path(request).read_text(encoding="utf-8")))
    except HiggstuneError as error:
        sys.exit(str(error))
    print(json.dumps(asdict(compared)))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
