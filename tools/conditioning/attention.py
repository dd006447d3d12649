"""Attention by layer: shares of attention between text, reference and clip, on the rows of a store.

    python tools/conditioning/attention.py --model DIR --adapter RUN --data STORE --out attention.png

Takes rows with a reference as an earlier turn, and makes a figure and a table. The keys are split into prompt,
reference and the clip itself.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from higgstune.batch.collate import PaddedCollator
from higgstune.batch.dataset import row_example
from higgstune.data.store import CodeStore
from higgstune.families.base import Example, base_of
from higgstune.families.higgs_v2.extensions import conditioning_of
from higgstune.families.higgs_v2.prompter import Prompter
from higgstune.inputs import find_adapter
from higgstune.kernels import IGNORE
from higgstune.model.adapters import load_adapter
from higgstune.model.load import load_model
from higgstune.model.tokenizer import load_prompter

QUERIES = ("frames of the clip", "the clip's transcript")
KEYS = ("other text", "the clip's transcript", "reference audio", "the clip itself")
SINK = "first token"  # which takes the attention that has no other target


def main() -> None:
    """Draw the figure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    args = parser.parse_args()
    model: Any = load_model(args.model, dtype="float32", device="cpu")
    model.set_attn_implementation("eager")  # the only one that returns its weights
    if args.adapter is not None:
        model = load_adapter(model, find_adapter(args.adapter))
    prompter = load_prompter(args.model)
    rows = [row for row in CodeStore.open(args.data).rows() if row.reference_codes is not None][: args.rows]
    shares = mean_shares(model, [row_example(prompter, row, "transcript") for row in rows], prompter)
    draw(args.out, shares)
    for (kind, query), values in shares.items():
        for layer, share in enumerate(values):
            columns = " | ".join(f"{100 * part:.0f} %" for part in share)
            print(f"| {kind} | {query} | {layer} | {columns} |")


def mean_shares(model: Any, examples: list[Example], prompter: Prompter) -> dict[tuple[str, str], np.ndarray]:
    """(attention, query) -> [layers, keys] share of attention, mean over heads, tokens and rows."""
    collected: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    base = base_of(model)
    config = base.config
    collate = PaddedCollator(pad_id=config.pad_token_id or 0, stream_eos=config.audio_stream_eos_id)
    has_audio_attention = conditioning_of(model).audio_attention
    for example in examples:
        inputs = {k: v for k, v in collate([example]).items() if not k.endswith(("_positions", "_targets"))}
        with torch.no_grad():
            weights = base.model(**inputs, output_attentions=True).attentions
        weights = [layer[0].mean(0).numpy() for layer in weights]  # [queries, keys] of each attention
        shared = weights[1::2] if has_audio_attention else weights
        groups = key_groups(example)
        for query in QUERIES:
            at = groups[query] if query in groups else groups["the clip itself"]
            found = [[layer[at][:, groups[key]].sum(-1).mean() for key in (*KEYS, SINK)] for layer in shared]
            collected["shared", query].append(np.array(found))
        if has_audio_attention:
            collected["audio", QUERIES[0]].append(audio_shares(weights[0::2], example, groups))
    return {key: np.mean(values, axis=0) for key, values in collected.items()}


def audio_shares(weights: list[np.ndarray], example: Example, groups: dict[str, np.ndarray]) -> np.ndarray:
    """[layers, keys] of the audio attention, whose queries and keys are audio frames only."""
    number = np.cumsum(example.audio_mask) - 1
    own, reference = number[groups["the clip itself"]], number[groups["reference audio"]]
    shares = np.zeros((len(weights), len(KEYS) + 1))
    for layer, values in enumerate(weights):
        shares[layer, KEYS.index("reference audio")] = values[own][:, reference].sum(-1).mean()
        shares[layer, KEYS.index("the clip itself")] = values[own][:, own].sum(-1).mean()
    return shares


def key_groups(example: Example) -> dict[str, np.ndarray]:
    """Indices of the tokens of each kind."""
    rows = np.flatnonzero(example.audio_mask)
    target = rows[len(rows) - count_target_rows(example) :]
    labelled = np.flatnonzero(example.text_labels != IGNORE)
    transcript = labelled[labelled < target[0] - 1]
    text = np.setdiff1d(np.flatnonzero(~example.audio_mask), np.append(transcript, 0))
    reference = np.setdiff1d(rows, target)
    kinds = dict(zip(KEYS, (text, transcript, reference, target), strict=True))
    return kinds | {SINK: np.array([0]), "frames of the clip": target}


def count_target_rows(example: Example) -> int:
    """Number of delayed frames of the target: those from the first labelled one on, and the BOS frame before it."""
    return len(example.audio_labels) - int(np.flatnonzero((example.audio_labels != IGNORE).any(1))[0]) + 1


def draw(path: Path, shares: dict[tuple[str, str], np.ndarray]) -> None:
    """One panel per attention and query, with a stacked bar per layer."""
    figure, axes = plt.subplots(1, len(shares), figsize=(4.2 * len(shares), 3.6), sharey=True, squeeze=False)
    for axis, ((kind, query), values) in zip(axes[0], shares.items(), strict=True):
        bottom = np.zeros(len(values))
        for key, part in zip((*KEYS, SINK), values.T, strict=True):
            axis.bar(range(len(values)), part, bottom=bottom, label=key)
            bottom += part
        axis.set(title=f"{kind} attention of\n{query}", xlabel="layer", xticks=range(len(values)))
    axes[0][0].set_ylabel("share of attention")
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
