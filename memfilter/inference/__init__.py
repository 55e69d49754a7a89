"""What the norm says before and after training: is a prompt memorized, by which words, and how is a copy avoided."""

from __future__ import annotations

import importlib

_WHERE = {
    "watch": "watching",
    "Watch": "watching",
    "MemorizationDetected": "watching",
    "CleanNorms": "clean",
    "Sampling": "detection",
    "measure_prompts": "detection",
    "clean_norms": "detection",
    "judge": "detection",
    "token_significance": "significance",
    "adjust_prompt": "mitigation",
    "add_random_tokens": "mitigation",
}
__all__ = list(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
