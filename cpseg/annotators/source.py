"""What an annotator is, as a line of text: so that a cache or calibration can refuse another."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import nn

__all__ = ["describe_source"]

_SAMPLES = 64


def describe_source(name: str, model: nn.Module | None, settings: Mapping[str, object]) -> str:
    """A line that changes with the weights or any setting, and not with the device.

    Args:
        name: What kind of annotator.
        model: Its network: names, shapes and 64 values of every parameter are hashed.
        settings: Everything else that changes logits; must be JSON or print the same each time.

    Returns:
        The line.

    Examples:
        >>> describe_source("mine", None, {"short": 512})
        'mine; settings 46ff3e9cd221'
    """
    body = json.dumps(dict(settings), sort_keys=True, default=str)
    line = f"{name}; settings {hashlib.sha256(body.encode()).hexdigest()[:12]}"
    return line if model is None else f"{line}; weights {_weights(model)}"


def _weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        flat = value.detach().flatten()
        if flat.numel():
            places = torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64)
            sample = flat[places.round().long().to(flat.device)].to("cpu", torch.float64)
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:12]
