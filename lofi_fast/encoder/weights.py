"""Encoder weights from elsewhere, by key mapping: torchvision, TSM, TSP and V-JEPA 2 checkpoints, our own runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lofi_fast.encoder.protocol import Encoder
from lofi_fast.errors import InputError

CLASSIFIER_KEYS = ("fc.", "fc1.", "fc2.", "new_fc.", "classifier.")


def map_key(key: str) -> str | None:
    """Our name of a checkpoint's key, or None for a classifier that is left behind.

    torchvision: the same names. TSM: `module.base_model.layer1.0.conv1.net.weight`, shifted convolutions wrapped in
    `.net`, the classifier `new_fc`. TSP: `features.layer1.0.conv1.0.0.weight`, two classifiers. V-JEPA 2:
    `module.backbone.blocks.0.attn.qkv.weight`. Ours: `encoder.` in front.
    """
    for prefix in ("module.", "base_model.", "encoder.", "backbone.", "features."):
        key = key.removeprefix(prefix)
    if key.startswith(CLASSIFIER_KEYS):
        return None
    return key.replace(".net.", ".")


def check_encoder_weights(make: Callable[[], Encoder], path: Path) -> None:
    """Raises InputError when `path` cannot be loaded into the encoder that `make` makes; computes nothing."""
    with torch.device("meta"):
        encoder = make()
    _fitting(encoder, path)


def load_encoder_weights(encoder: Encoder, path: Path) -> str:
    """Load `path` into `encoder`; returns a sentence on what was loaded. Raises InputError when it does not fit."""
    state = _fitting(encoder, path)
    encoder.load_state_dict(state, strict=False)
    return f"encoder weights: {path} ({len(state)} tensors)"


def _fitting(encoder: Encoder, path: Path) -> dict[str, Tensor]:
    """The tensors of `path` by the encoder's names, all of its shapes and finite."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the encoder's weights with --encoder-weights FILE") from None
    except Exception as error:  # a foreign file can make the unpickler raise anything
        raise InputError(f"{path}: not a PyTorch checkpoint that holds only tensors ({type(error).__name__})") from None
    for name in ("state_dict", "target_encoder", "encoder", "model"):  # V-JEPA's target is the one that it evaluates
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a state dict; see --encoder-weights")
    state: dict[str, Tensor] = {}
    for key, value in content.items():
        mapped = map_key(str(key))
        if mapped is not None and isinstance(value, Tensor):
            state[mapped] = value
    expected = encoder.state_dict()
    added = [k for k in expected if any(part in k for part in encoder.added)]
    begin_anew = set() if any(k in state for k in added) else set(added)
    missing = [k for k in expected if k not in state.keys() | begin_anew and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in expected]
    if missing or unknown:
        raise InputError(
            f"{path}: not weights of {encoder.name}: {len(missing)} tensors missing"
            f"{f' (first {missing[0]})' if missing else ''}, {len(unknown)} unknown"
            f"{f' (first {unknown[0]})' if unknown else ''}; change --encoder or --encoder-weights"
        )
    wrong = [k for k in state if state[k].shape != expected[k].shape]
    if wrong:
        raise InputError(
            f"{path}: {wrong[0]} has shape {tuple(state[wrong[0]].shape)} where this {encoder.name} has "
            f"{tuple(expected[wrong[0]].shape)}; change --encoder, --width or --encoder-weights"
        )
    if broken := [k for k, value in state.items() if not bool(value.isfinite().all())]:
        raise InputError(
            f"{path}: {broken[0]} holds a NaN or an infinity (its training has diverged); give other --encoder-weights"
        )
    return state
