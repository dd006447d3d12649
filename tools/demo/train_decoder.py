"""Train the source-filter decoder of the demo's codec: log-mel of decoded codes -> waveform. No adversary.

    python tools/demo/train_decoder.py src/higgstune/demo/assets/codec corpus/hibari:40 corpus/rms:25 \\
        corpus/slt:12 corpus/awb:12 --work corpus/decoder --steps 10000

Writes `decoder.safetensors` into the codec's folder, at each report; the same command resumes from `--work`.

Losses of magnitudes cannot teach phase. Here the phase of voiced sound comes from a pulse train, and in training the
pulses are locked to the recording: their phase follows the recording's fundamental, so that a loss of complex spectra
means something. When a decoder speaks, the pulses begin at any phase.

Needs Higgstune, and `pip install praat-parselmouth==0.4.7` for the pitch of the recordings.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import parselmouth
import torch
import torch.nn.functional as F
from fit_codec import first_minutes
from safetensors.numpy import save_file
from torch import Tensor, nn

from higgstune.codec import source_filter as sf
from higgstune.codec.mel import MelCodec, Spectrum

SEGMENT = 48  # columns: 0.48 s
BATCH = 12
RESOLUTIONS = ((1024, 256), (512, 128), (2048, 512), (240, 60))  # window and hop, samples
EMA = 0.998


class Network(nn.Module):
    """A convolution and ConvNeXt blocks. [B, T, C] -> [B, T, D]."""

    def __init__(self, inputs: int, width: int, outputs: int, blocks: int, expansion: int) -> None:
        super().__init__()
        self.input = nn.Conv1d(inputs, width, sf.KERNEL, padding=sf.KERNEL // 2)
        self.blocks = nn.ModuleList(Block(width, expansion) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x.mT).mT
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))


class Block(nn.Module):
    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, sf.KERNEL, padding=sf.KERNEL // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x.mT).mT)
        return x + self.scale * self.down(F.gelu(self.up(y), approximate="tanh"))


class Decoder(nn.Module):
    """Both networks; `filter` reads the scaled log-mel, the voicing and the logarithm of F0."""

    def __init__(self, num_mels: int) -> None:
        super().__init__()
        self.pitch = Network(num_mels, 96, len(sf.PITCH_BINS) + 1, sf.PITCH_BLOCKS, 2)
        self.filter = Network(num_mels + 2, 192, 3 * sf.BINS, sf.FILTER_BLOCKS, 3)
        with torch.no_grad():
            self.filter.output.weight *= 0.3
            self.filter.output.bias.copy_(
                torch.cat([torch.full((sf.BINS,), -3.0), torch.zeros(sf.BINS), torch.full((sf.BINS,), -4.0)])
            )


@dataclass(frozen=True)
class Clip:
    """A recording with what the decoder reads, in columns of HOP samples."""

    waveform: np.ndarray  # [T * HOP] float16
    pulses: np.ndarray  # [T * HOP] float16, locked to the recording
    mel: np.ndarray  # [T, M] scaled, of the decoded codes
    f0: np.ndarray  # [T] Hz, held where unvoiced
    voiced: np.ndarray  # [T] 0 or 1


def measured_pitch(waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[T * HOP] -> F0 [T] in Hz, held over what is unvoiced, and voicing [T]."""
    sound = parselmouth.Sound(waveform.astype(np.float64), sampling_frequency=sf.SAMPLE_RATE)
    found = sound.to_pitch_ac(time_step=sf.HOP / sf.SAMPLE_RATE, pitch_floor=65, pitch_ceiling=420)
    at = (np.arange(len(waveform) // sf.HOP) + 0.5) * sf.HOP / sf.SAMPLE_RATE
    hertz = found.selected_array["frequency"]
    nearest = np.abs(found.xs()[:, None] - at).argmin(0) if len(hertz) else np.zeros(len(at), int)
    f0 = hertz[nearest] if len(hertz) else np.zeros(len(at))
    voiced = f0 > 0
    if not voiced.any():
        return np.full(len(at), 150.0, np.float32), np.zeros(len(at), np.float32)
    last = np.maximum.accumulate(np.where(voiced, np.arange(len(at)), -1))
    return f0[np.where(last < 0, voiced.argmax(), last)].astype(np.float32), voiced.astype(np.float32)


def lock(waveform: np.ndarray, f0: np.ndarray, voiced: np.ndarray) -> np.ndarray:
    """The phase [T * HOP] to add to that of the pulses, so that their fundamental is the recording's."""
    at = (np.arange(len(waveform)) + 0.5) / sf.HOP - 0.5
    columns = np.arange(len(f0))
    phase = np.cumsum(np.interp(at, columns, f0) / sf.SAMPLE_RATE) * 2 * np.pi
    window = np.hanning(602)[1:-1]
    moved = waveform * np.exp(-1j * phase)
    low = np.fft.ifft(
        np.fft.fft(moved, 2 * len(moved)) * np.fft.fft(np.roll(np.pad(window, (0, 2 * len(moved) - 600)), -300))
    )
    angle = np.angle(low[: len(moved)][sf.HOP // 2 :: sf.HOP])
    known = np.flatnonzero(voiced)
    if len(known) == 0:
        return np.zeros(len(waveform))
    return np.interp(at, known, np.unwrap(angle[known]))


def read_clips(codec: MelCodec, source: str) -> list[Clip]:
    folder, minutes = source.rsplit(":", 1)
    clips = []
    for waveform in first_minutes(Path(folder), float(minutes)):
        codes = codec.encode(waveform)
        mel = (codec.log_mel(codes) + sf.MEL_SHIFT) / sf.MEL_SCALE
        waveform = np.pad(waveform, (0, len(mel) * sf.HOP - len(waveform)))
        f0, voiced = measured_pitch(waveform)
        pulses = sf.excitation(f0, voiced, lock(waveform, f0, voiced))
        if len(mel) > SEGMENT:
            clips.append(
                Clip(waveform.astype(np.float16), pulses.astype(np.float16), mel.astype(np.float32), f0, voiced)
            )
    return clips


def draw(voices: list[list[Clip]], generator: np.random.Generator) -> dict[str, Tensor]:
    """Segments of clips, of each voice equally many but twice as many of the first."""
    chances = np.array([2.0] + [1.0] * (len(voices) - 1))
    parts = {name: [] for name in ("waveform", "pulses", "mel", "f0", "voiced")}
    for voice in generator.choice(len(voices), size=BATCH, p=chances / chances.sum()):
        clip = voices[voice][generator.integers(len(voices[voice]))]
        first = generator.integers(len(clip.mel) - SEGMENT)
        for name in ("waveform", "pulses"):
            parts[name].append(getattr(clip, name)[first * sf.HOP : (first + SEGMENT) * sf.HOP].astype(np.float32))
        for name in ("mel", "f0", "voiced"):
            parts[name].append(getattr(clip, name)[first : first + SEGMENT])
    return {name: torch.from_numpy(np.stack(values)) for name, values in parts.items()}


WINDOW = torch.hann_window(sf.N_FFT)


def stft(x: Tensor) -> Tensor:
    """[B, T * HOP] -> [B, T, BINS], as `source_filter.stft`."""
    margin = (sf.N_FFT - sf.HOP) // 2
    frames = F.pad(x, (margin, sf.N_FFT - sf.HOP - margin)).unfold(-1, sf.N_FFT, sf.HOP)
    return torch.fft.rfft(frames * WINDOW)


def overlap_add(spectrum: Tensor) -> Tensor:
    pieces = torch.fft.irfft(spectrum, n=sf.N_FFT) * WINDOW / 1.5  # [B, T, N_FFT]
    columns = pieces.shape[1]
    total = F.fold(pieces.mT, (1, (columns - 1) * sf.HOP + sf.N_FFT), (1, sf.N_FFT), stride=(1, sf.HOP)).flatten(1)
    margin = (sf.N_FFT - sf.HOP) // 2
    return total[:, margin : margin + columns * sf.HOP]


def spoken(model: Decoder, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The waveform [B, T * HOP], and the spectrum of its voiced part."""
    read = torch.cat([batch["mel"], batch["voiced"][..., None], torch.log(batch["f0"] / 150)[..., None]], dim=-1)
    gain, phase, noise = model.filter(read).float().chunk(3, -1)
    pulses = stft(batch["pulses"]) * torch.polar(gain.clamp(max=7).exp(), phase)
    white = stft(torch.randn_like(batch["waveform"])) * noise.clamp(max=7).exp()
    return overlap_add(pulses + white), pulses


MELS = torch.from_numpy(Spectrum(sf.SAMPLE_RATE, 1024, 240, 80, 12_000.0).filters)


def decoder_loss(model: Decoder, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
    made, pulses = spoken(model, batch)
    wanted = batch["waveform"]
    parts = []
    for window, hop in RESOLUTIONS:
        a, b = (_magnitude(x, window, hop) for x in (made, wanted))
        parts.append(
            torch.linalg.norm(a - b) / torch.linalg.norm(b) + ((a + 0.01).log() - (b + 0.01).log()).abs().mean()
        )
    a, b = ((_magnitude(x, 1024, 240).mT @ MELS + 0.01).log() for x in (made, wanted))
    mel = (a - b).abs().mean()
    below = int(6000 / sf.SAMPLE_RATE * sf.N_FFT)
    target = stft(wanted)[..., :below] * batch["voiced"][..., None]
    voiced = pulses[..., :below] * batch["voiced"][..., None]
    relative = (voiced - target).abs().sum() / target.abs().sum().clamp(min=1)
    return torch.stack(parts).mean() + mel + 0.3 * relative, float(mel.detach())


def _magnitude(x: Tensor, window: int, hop: int) -> Tensor:
    return torch.stft(x, window, hop, window=torch.hann_window(window), return_complex=True).abs().clamp(min=1e-7)


def pitch_loss(model: Decoder, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy to a Gaussian of one bin around the measured pitch where voiced, and of the voicing."""
    scores = model.pitch(batch["mel"])
    bins = torch.from_numpy(np.log(sf.PITCH_BINS))
    width = bins[1] - bins[0]
    target = torch.softmax(-0.5 * ((batch["f0"].log()[..., None] - bins) / width) ** 2, dim=-1)
    entropy = -(target * scores[..., :-1].log_softmax(-1)).sum(-1)
    voiced = batch["voiced"]
    return (entropy * voiced).sum() / voiced.sum().clamp(min=1) + F.binary_cross_entropy_with_logits(
        scores[..., -1], voiced
    )


def write(average: dict[str, Tensor], folder: Path) -> None:
    part = folder / (sf.WEIGHTS + ".part")
    save_file({name: tensor.numpy().astype(np.float16) for name, tensor in average.items()}, part)
    part.replace(folder / sf.WEIGHTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codec", type=Path, help="folder of the codec")
    parser.add_argument("sources", nargs="+", metavar="FOLDER:MINUTES", help="the first one is drawn twice as often")
    parser.add_argument("--work", type=Path, required=True, help="folder of the training's state")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    generator = np.random.default_rng(args.seed)
    codec = MelCodec.from_pretrained(args.codec)
    voices = [read_clips(codec, source) for source in args.sources]
    print(json.dumps({"clips": [len(clips) for clips in voices]}), flush=True)
    model = Decoder(codec.config.num_mels)
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}), flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.8, 0.99))
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    step, cpu, state = 0, 0.0, args.work / "state.pt"
    args.work.mkdir(parents=True, exist_ok=True)
    if state.exists():
        saved = torch.load(state, weights_only=False)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, step, cpu = saved["average"], saved["step"], saved["cpu"]
        generator.bit_generator.state = saved["numpy"]
        torch.set_rng_state(saved["torch"])
    reported, started, mels = time.process_time(), time.process_time() - cpu, []
    while step < args.steps:
        for group in optimizer.param_groups:
            group["lr"] = (
                args.lr * min(1, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / args.steps)))
            )
        batch = draw(voices, generator)
        loss, mel = decoder_loss(model, batch)
        pitch = pitch_loss(model, batch)
        optimizer.zero_grad()
        (loss + pitch).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {step}: the gradient is not finite")
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name].lerp_(p, 1 - min(EMA, (1 + step) / (10 + step)))
        step += 1
        mels.append(mel)
        if time.process_time() - reported > 60 or step == args.steps:
            reported = time.process_time()
            cpu = reported - started
            line = {"step": step, "cpu_minutes": round(cpu / 60, 1), "loss": round(float(loss.detach()), 3)}
            print(
                json.dumps(line | {"mel": round(float(np.mean(mels)), 4), "pitch": round(float(pitch.detach()), 3)}),
                flush=True,
            )
            mels = []
            write(average, args.codec)
            torch.save(
                {
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step,
                    "cpu": cpu, "numpy": generator.bit_generator.state, "torch": torch.get_rng_state(),
                },
                state.with_suffix(".part"),
            )  # fmt: skip
            state.with_suffix(".part").replace(state)


if __name__ == "__main__":
    main()
