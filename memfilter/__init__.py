"""memfilter keeps a text-to-image diffusion model from memorizing its training data while it is fine-tuned."""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "MemFilter": "memfilter.filter",
    "FilteredUNet": "memfilter.unet",
    "FilterStats": "memfilter.stats",
    "Evidence": "memfilter.evidence",
    "Calibration": "memfilter.calibration",
    "TimestepThreshold": "memfilter.threshold",
    "validate": "memfilter.preflight",
    "text_norm": "memfilter.functional",
    "keep_mask": "memfilter.functional",
    "masked_loss": "memfilter.functional",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    # torch takes seconds to import; `import memfilter` must not
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'memfilter' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
