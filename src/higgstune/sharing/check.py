"""Whether a merged checkpoint, read back from the disk, is the base with its adapter: by its logits."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from higgstune.batch.padded import Batch
from higgstune.errors import VerificationError
from higgstune.prompt.delay import IGNORE
from higgstune.sharing.held_out import HeldOut
from higgstune.training.verify import MARGIN
from higgstune.training.verify import TOLERANCE as RELOAD_TOLERANCE

Logits = Mapping[str, Tensor]

# Of the largest difference of a logit (float32), of the mean difference (bfloat16, where each weight is rounded once
# more, to 1 part in 256). What was measured, and where: docs/sharing.md.
TOLERANCE = {"float32": 5e-4, "bfloat16": 0.2}
# An adapter moves the base's logits by more than this, or training would not have let it pass.
MOVES = {dtype: MARGIN * tolerance for dtype, tolerance in RELOAD_TOLERANCE.items()}
NEARER = 2  # the merged model is this many times nearer to base + adapter than to the base


@dataclass(frozen=True)
class MergeCheck:
    """What was compared, and how it came out; differences are those of `TOLERANCE`'s dtype."""

    dtype: str
    tolerance: float
    from_adapter: float  # |merged - (base + adapter)|
    from_base: float  # |merged - base|
    clips: int
    origin: str  # of the clips


def check_merged(merged: Logits, adapted: Logits, base: Logits, *, dtype: str, held_out: HeldOut) -> MergeCheck:
    """Compare logits on the same positions. Raises VerificationError unless merged is adapted, and not base."""
    result = MergeCheck(
        dtype=dtype,
        tolerance=TOLERANCE[dtype],
        from_adapter=difference(merged, adapted, dtype),
        from_base=difference(merged, base, dtype),
        clips=held_out.clips,
        origin=held_out.origin,
    )
    what = "largest" if dtype == "float32" else "mean"
    if not result.from_base > MOVES[dtype]:
        raise VerificationError(
            f"the merged model hardly differs from the base: its logits by {result.from_base:.2e} ({what} difference, "
            f"{dtype}), which is not more than {MOVES[dtype]:.0e}: the adapter is not in it, or too weak for {dtype}"
            + ("; --dtype float32 keeps a weak one" if dtype == "bfloat16" else "")
        )
    if not result.from_adapter <= result.tolerance:
        raise VerificationError(
            f"the merged model is not the base with its adapter: logits differ by {result.from_adapter:.2e} ({what} "
            f"difference, {dtype}), more than {result.tolerance:.0e}; it was not kept"
        )
    if not NEARER * result.from_adapter <= result.from_base:
        raise VerificationError(
            f"the merged model differs from the base with its adapter by {result.from_adapter:.2e} and from the base "
            f"alone by {result.from_base:.2e} ({what} difference, {dtype}): rounding drowns this adapter; "
            "--dtype float32 keeps it"
        )
    return result


def difference(a: Logits, b: Logits, dtype: str) -> float:
    """The largest (float32) or mean (bfloat16) difference, of audio or text logits, whichever is larger."""
    gaps = [(a[key] - b[key]).abs() for key in a if a[key].numel()]
    return max((gap.max() if dtype == "float32" else gap.mean()).item() for gap in gaps)


def audio_loss(logits: Logits, batch: Batch) -> float:
    """Mean cross entropy of the labelled cells, in nats: audio logits [M, K * V], targets [M, K]."""
    targets = batch["audio_targets"]
    cells = logits["audio_logits"].unflatten(-1, (targets.shape[1], -1)).flatten(0, 1)
    return F.cross_entropy(cells, targets.flatten(), ignore_index=IGNORE).item()
