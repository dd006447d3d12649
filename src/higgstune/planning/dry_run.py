"""The real optimizer step on tensors without values: what memory it takes, with nothing loaded and nothing computed.

Model, adapter, packed batch, loss, backward pass, clipping and optimizer are those of training; only the tensors are
fake. They are fake tensors of a CPU, whatever is planned for: shapes and dtypes decide, not kernels.
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


class FourBits(nn.Linear):
    """What `bitsandbytes.nn.Linear4bit` keeps and takes, without its numbers. Made on the meta device."""

    def __init__(self, whole: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.shape, self.dtype = whole.weight.shape, whole.weight.dtype
        packed = torch.empty(bytes_in_4_bits(whole.weight), dtype=torch.uint8)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.bias = whole.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The unpacked weight, which DoRA reads for its norm."""
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


def put_in_4_bits(model: nn.Module, names: list[str]) -> None:
    """Exchange layers of a model on the meta device for stand-ins, in place."""
    for name in names:
        whole = model.get_submodule(name)
        assert isinstance(whole, nn.Linear)
        model.set_submodule(name, FourBits(whole))


Bytes = Counter[str]  # by kind
_DEVICE = torch.ops.prim.device.default


class Tracker(TorchDispatchMode):
    """Counts the storages that operations make until they are freed, each as of the kind that is set at the time.

    Work is cut into segments by `begin`; `peaks` has for each segment what was alive when that was most. What a kernel
    takes for itself alone is not seen. Real tensors are counted as well as fake ones.
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
        """From here on: this segment (which may continue an earlier one), and new storages are of this kind."""
        self._segment, self.kind = segment, kind
        self._note()

    def count(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage as of this kind, whether it was counted before or not."""
        storage = tensor.untyped_storage()
        self._forget(id(storage))
        self._add(storage, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation comes by here."""
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


WEIGHTS, ADAPTER, OPTIMIZER, GRADIENTS = "weights", "adapter", "optimizer", "gradients"
ACTIVATIONS, TRANSIENT = "activations", "transient"
KINDS = (WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER, ACTIVATIONS, TRANSIENT)

Peaks = dict[str, Bytes]  # part of an optimizer step -> what is alive when that is most


@dataclass(frozen=True)
class StepSpec:
    """What is trained in a stage: everything that memory follows from, but for the layers and the pack."""

    family: Family
    config: Any
    base: Spec  # the numbers of `config`
    dtype: torch.dtype
    lora: Lora
    kind: str
    own: Conditioning  # what the checkpoint brings
    trained: Conditioning  # with what is added
    attention: AttentionTraining
    quantize: Quantize | None
    on_cuda: bool
    accumulation: bool  # gradients of earlier micro-batches are there already


def dry_run(spec: StepSpec, pack: Packed, layers: tuple[int, int], *, validation: Packed | None = None) -> Peaks:
    """One optimizer step of a model with `layers`: the first so many recomputed, so many others.

    Peaks: `start` (before the step), `forward` (with the heads), `backward` of the first and last layer of either sort,
    `step`, and, with a pack of validation rows, `validation`.
    """
    again, kept = layers
    model = _model(spec, again + kept)
    with FakeTensorMode(), ExitStack() as stack:
        _from_meta(model)
        tracker = Tracker()
        decoder_layers = spec.family.layers(model)
        checkpoint_first(decoder_layers, again)
        _mark_backward(decoder_layers, again, tracker)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for tensor in (*model.parameters(), *model.buffers()):
            tracker.count(tensor, ADAPTER if tensor.requires_grad else WEIGHTS)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(partial(_gradient, tracker))
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        stack.enter_context(tracker)
        tracker.begin("optimizer", OPTIMIZER)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        if not spec.accumulation:
            optimizer.zero_grad()
        for parameter in trained if spec.accumulation else ():
            assert parameter.grad is not None
            tracker.count(parameter.grad, GRADIENTS)
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


def _step(spec: StepSpec, model: PeftModel, optimizer: Any, pack: Packed, tracker: Tracker) -> None:
    """What `HiggsAudioTrainer` does for an optimizer step."""
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
    """The dtypes and the kind of attention that the device in question would take."""
    with ExitStack() as stack:
        if autocast and spec.dtype == torch.bfloat16:
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        if spec.on_cuda and spec.dtype == torch.float32:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # no kernel takes float32 and fewer keys than queries
        yield


def _model(spec: StepSpec, layers: int) -> PeftModel:
    """The model of a stage on the meta device."""
    family = spec.family
    with torch.device("meta"):
        model = family.build(spec.config, layers=layers, dtype=spec.dtype)
        family.extensions.add(model, spec.own)
        in_4_bits = layers_in_4_bits(model, family.four_bits) if spec.quantize is not None else []
        family.extensions.add(model, spec.trained)
        put_in_4_bits(model, in_4_bits)
        family.pack_forward(model)
        return with_adapter(model, lora_config(spec.lora, family, spec.kind, spec.trained, spec.attention))


def _from_meta(model: nn.Module) -> None:
    """Tensors of the meta device become fake ones of a CPU, which knows how it would compute."""
    for part in model.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(torch.empty(value.shape, dtype=value.dtype), value.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _fake(pack: Packed) -> Packed:
    """The batch with tensors that have shape and dtype, but no values."""
    return {
        key: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
        for key, value in pack.items()
    }


def _gradient(tracker: Tracker, parameter: Tensor) -> None:
    assert parameter.grad is not None
    tracker.count(parameter.grad, GRADIENTS)


def _mark_backward(layers: nn.ModuleList, again: int, tracker: Tracker) -> None:
    """Begin a segment where the backward pass comes to a layer: those between first and last never need most."""
    for index, layer in enumerate(layers):
        sort, place, count = ("again", index, again) if index < again else ("kept", index - again, len(layers) - again)
        which = "last" if place == count - 1 else "first" if place == 0 else "between"
        layer.register_forward_hook(_marker(f"backward {sort} {which}", tracker))


def _marker(segment: str, tracker: Tracker) -> Callable[..., None]:
    def on_gradient(_: Tensor) -> None:
        tracker.begin(segment, TRANSIENT)

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(on_gradient)

    return hook
