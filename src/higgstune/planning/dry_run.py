"""A dry run of the real optimizer step on fake tensors, to count its memory without loading or computing anything.

Model, adapter, packed batch, loss, backward pass, clipping and optimizer are those of training. The fake tensors are
CPU tensors, whatever the planned device: shapes and dtypes decide about memory, not kernels.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from higgstune.batch.collate import Packed
from higgstune.config.recipe import AttentionTraining, Lora, Quantize
from higgstune.families.base import Conditioning, Family, Spec
from higgstune.kernels.loss import LossWeights, combine, label_counts
from higgstune.kernels.memory import checkpoint_first
from higgstune.kernels.quantize import bytes_in_4_bits, layers_in_4_bits
from higgstune.model.adapters import lora_config, with_adapter
from higgstune.peft_compat import PeftModel

WEIGHTS, ADAPTER, OPTIMIZER, GRADIENTS = "weights", "adapter", "optimizer", "gradients"
ACTIVATIONS, TRANSIENT = "activations", "transient"
KINDS = (WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER, ACTIVATIONS, TRANSIENT)
Bytes = Counter[str]  # by kind
Peaks = dict[str, Bytes]  # segment of an optimizer step -> live bytes by kind at its peak
_DEVICE = torch.ops.prim.device.default


@dataclass(frozen=True)
class StepSpec:
    """Everything that determines the memory of a stage's optimizer step, except for the layers and the pack."""

    family: Family
    config: Any
    base: Spec  # the numbers of `config`
    dtype: torch.dtype
    lora: Lora
    kind: str
    builtin_extensions: Conditioning  # of the checkpoint
    trained: Conditioning  # with those that the recipe adds
    attention: AttentionTraining
    quantize: Quantize | None
    on_cuda: bool
    accumulation: bool  # earlier micro-batches have left gradients


class Tracker(TorchDispatchMode):
    """Counts the bytes of live storages by kind, from their creation until they are freed.

    `begin` starts a segment and sets the kind of the storages that follow; `peaks` holds the bytes by kind at each
    segment's peak. Workspace inside a kernel is not counted. Works with real and with fake tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "other"
        self.alive: Bytes = Counter()
        self.peaks: dict[str, Bytes] = {}
        self._segment = ""
        self._total = 0
        self._kinds: dict[int, tuple[str, int]] = {}  # storage -> its kind and bytes
        self._references: dict[int, weakref.ref[Any]] = {}

    def begin(self, segment: str, kind: str) -> None:
        """Start or resume a segment; storages created from here on are of this kind."""
        self._segment, self.kind = segment, kind
        self._note()

    def count(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage under this kind, whether or not it was counted before."""
        storage = tensor.untyped_storage()
        self._forget(id(storage))
        self._add(storage, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages that it creates."""
        if func is _DEVICE:
            return args[0].device  # kernels query the device of fake tensors more often than they compute
        out = kwargs.get("out") if kwargs else None
        if isinstance(out, FakeTensor) and out.numel():
            return out  # allocates nothing, and PyTorch does not cache the result's shape here
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            for value in (result,) if isinstance(result, Tensor) else tree_iter(result):
                if isinstance(value, Tensor):
                    storage = value.untyped_storage()
                    if id(storage) not in self._kinds:
                        self._add(storage, self.kind)
        return result

    def _add(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size = id(storage), storage.nbytes()
        self._kinds[key] = kind, size
        self._references[key] = weakref.ref(storage, lambda _, key=key: self._forget(key))  # type: ignore[misc]
        self.alive[kind] += size
        self._total += size
        self._note()

    def _forget(self, key: int) -> None:
        self._references.pop(key, None)
        kind, size = self._kinds.pop(key, ("other", 0))
        self.alive[kind] -= size
        self._total -= size

    def _note(self) -> None:
        highest = self.peaks.get(self._segment)
        if highest is None or self._total > highest.total():
            self.peaks[self._segment] = Counter(self.alive)


def dry_run(spec: StepSpec, pack: Packed, layers: tuple[int, int], *, validation: Packed | None = None) -> Peaks:
    """Run one optimizer step of a model with `layers`: the number that are recomputed, then the number that are not.

    Returns the peaks of `start` (before the step), `forward` (with the heads), `heads` (their backward pass), `backward
    recomputed first` and so on for the first and last layer of either sort, `step`, and `validation` if there is a pack
    of validation rows.
    """
    recomputed, kept = layers
    model = _model(spec, recomputed + kept)
    with FakeTensorMode(), ExitStack() as stack:
        _from_meta(model)
        tracker = Tracker()
        decoder_layers = spec.family.layers(model)
        checkpoint_first(decoder_layers, recomputed)
        _mark_backward(decoder_layers, recomputed, tracker)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for tensor in (*model.parameters(), *model.buffers()):
            tracker.count(tensor, ADAPTER if tensor.requires_grad else WEIGHTS)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(partial(_gradient, tracker))
        stack.enter_context(tracker)
        optimizer = _optimizer(trained, tracker, accumulation=spec.accumulation)
        tracker.peaks.clear()
        tracker.begin("start", OPTIMIZER)
        _step(spec, model, optimizer, _fake(pack), tracker)
        if validation is not None:
            optimizer.zero_grad()
            tracker.begin("validation", TRANSIENT)
            model.eval()
            with torch.no_grad(), _kernels(spec):
                model(**_fake(validation))
        return tracker.peaks


def _optimizer(trained: list[nn.Parameter], tracker: Tracker, *, accumulation: bool) -> torch.optim.Optimizer:
    """The optimizer with its moments, and with gradients if earlier micro-batches have left some."""
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    tracker.begin("optimizer", OPTIMIZER)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if not accumulation:
        optimizer.zero_grad()
    for parameter in trained if accumulation else ():
        assert parameter.grad is not None
        tracker.count(parameter.grad, GRADIENTS)
    return optimizer


def _step(spec: StepSpec, model: PeftModel, optimizer: Any, pack: Packed, tracker: Tracker) -> None:
    """The optimizer step of `HiggsAudioTrainer`."""
    model.train()
    tracker.begin("forward", ACTIVATIONS)
    with _kernels(spec):
        sums = model(**pack)
    loss = combine(sums, label_counts(pack, eos_id=spec.base.stream_eos), LossWeights())
    tracker.begin("heads", TRANSIENT)
    with _kernels(spec, autocast=False):
        loss.backward()
    tracker.begin("step", TRANSIENT)
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.found_inf = (~torch.isfinite(norm)).float()
    optimizer.step()


@contextmanager
def _kernels(spec: StepSpec, *, autocast: bool = True) -> Iterator[None]:
    """Autocast and the attention kernel as on the planned device."""
    with ExitStack() as stack:
        if autocast and spec.dtype == torch.bfloat16:
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        if spec.on_cuda and spec.dtype == torch.float32:
            # no other kernel takes float32 with fewer key heads than query heads
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def _model(spec: StepSpec, layers: int) -> PeftModel:
    """A stage's model with so many layers, on the meta device."""
    family = spec.family
    with torch.device("meta"):
        model = family.build(spec.config, layers=layers, dtype=spec.dtype)
        family.extensions.add(model, spec.builtin_extensions)
        in_4_bits = layers_in_4_bits(model, family.four_bits) if spec.quantize is not None else []
        family.extensions.add(model, spec.trained)
        put_in_4_bits(model, in_4_bits)
        family.pack_forward(model)
        return with_adapter(model, lora_config(spec.lora, family, spec.kind, spec.trained, spec.attention))


def _from_meta(model: nn.Module) -> None:
    """Replace tensors on the meta device by fake CPU tensors, for which PyTorch chooses CPU kernels."""
    for part in model.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(torch.empty(value.shape, dtype=value.dtype), value.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _fake(pack: Packed) -> Packed:
    """The batch with fake tensors of the same shapes and dtypes."""
    return {
        key: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
        for key, value in pack.items()
    }


def _gradient(tracker: Tracker, parameter: Tensor) -> None:
    assert parameter.grad is not None
    tracker.count(parameter.grad, GRADIENTS)


def _mark_backward(layers: nn.ModuleList, recomputed: int, tracker: Tracker) -> None:
    """Begin a segment where the backward pass reaches a layer; layers between first and last share one."""
    for index, layer in enumerate(layers):
        sort, place, count = (
            ("recomputed", index, recomputed)
            if index < recomputed
            else ("kept", index - recomputed, len(layers) - recomputed)
        )
        which = "last" if place == count - 1 else "first" if place == 0 else "between"
        layer.register_forward_hook(_marker(f"backward {sort} {which}", tracker))


def _marker(segment: str, tracker: Tracker) -> Callable[..., None]:
    def on_gradient(_: Tensor) -> None:
        tracker.begin(segment, TRANSIENT)

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(on_gradient)

    return hook


def put_in_4_bits(model: nn.Module, names: list[str]) -> None:
    """Replace the named linear layers of a model on the meta device by `FourBits`, in place."""
    for name in names:
        whole = model.get_submodule(name)
        assert isinstance(whole, nn.Linear)
        model.set_submodule(name, FourBits(whole))


class FourBits(nn.Linear):
    """A stand-in for `bitsandbytes.nn.Linear4bit` that takes the same memory. Built on the meta device."""

    def __init__(self, whole: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.shape, self.dtype = whole.weight.shape, whole.weight.dtype
        packed = torch.empty(bytes_in_4_bits(whole.weight), dtype=torch.uint8)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.bias = whole.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight, which DoRA needs for its norm."""
        return self.packed.new_empty(self.shape, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        return _Product.apply(x, self.packed, self.shape, self.dtype)


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.dtype = shape, dtype
        ctx.save_for_backward(packed)
        return F.linear(x.to(dtype), packed.new_empty(shape, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (packed,) = ctx.saved_tensors
        return grad @ packed.new_empty(ctx.shape, dtype=ctx.dtype), None, None, None
