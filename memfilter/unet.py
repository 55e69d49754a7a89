"""A denoiser whose training forward runs twice: without gradient for the empty prompt, on all samples or on those that are
worth it, then as it always did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


class FilteredUNet(nn.Module):
    """Wraps a denoiser called as ``unet(sample, timestep, encoder_hidden_states, ...)``.

    Both passes run inside one forward, so that DDP, DeepSpeed and FSDP see one call. The state dict is that of the
    wrapped denoiser: checkpoints and pipelines carry no prefix. Attributes that the wrapper lacks are looked up on the
    denoiser (``unet.config``, ``unet.enable_gradient_checkpointing()``, ``unet.save_pretrained(...)``).

    Args:
        unet: the denoiser; kept as ``.unet``.
        null: embedding of the empty prompt, [L, D] or [1, L, D]; or, where the model needs more, a mapping of keyword
            arguments, such as ``{"encoder_hidden_states": ..., "added_cond_kwargs": {"text_embeds": ...}}``. Entries
            of a nested mapping replace those of the call; its other entries (SDXL's ``time_ids``) stay. A call's
            ``encoder_attention_mask`` is the prompt's alone: name the empty one's here if the model wants one.
        judge: called with (cond [B, ...], null [n, ...], timesteps [B], rows), gives (text_norm [B], keep [B]).
        select: called with B, gives the n rows that the extra pass is made for; None stands for all. Of no rows no pass is
            made, and ``null`` is None for the judge.
        static_shapes: the extra pass is filled up to B or the next power of two, by rows that count for nothing: what is
            compiled for one shape is not compiled again for every n.

    A forward in eval mode or under no_grad is that of the denoiser, unchecked and uncounted. A training forward adds
    ``text_norm`` [B] and ``keep`` [B] to the output; with ``return_dict=False`` they stand behind the sample.
    """

    def __init__(
        self,
        unet: nn.Module,
        null,
        judge: Callable,
        select: Callable[[int], Sequence[int] | None] = lambda batch_size: None,
        static_shapes: bool = False,
    ):
        super().__init__()
        self.unet = unet
        self._judge, self._select = judge, select
        self._static_shapes = static_shapes
        null = dict(null) if isinstance(null, Mapping) else {"encoder_hidden_states": null}
        self._null_names = _register_tree(self, null, "_null")
        self._register_state_dict_hook(_strip_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("unet"), name)

    def forward(self, sample: Tensor, timestep, encoder_hidden_states: Tensor | None = None, *args, **kwargs):
        if encoder_hidden_states is not None:
            kwargs["encoder_hidden_states"] = encoder_hidden_states
        if args:
            raise TypeError("a wrapped denoiser takes everything after encoder_hidden_states by keyword")
        if not (self.training and torch.is_grad_enabled()):
            return self.unet(sample, timestep, **kwargs)
        rows = self._select(len(sample))
        null_pred = None if rows is not None and not len(rows) else self._null_pass(sample, timestep, kwargs, rows)
        out = self.unet(sample, timestep, **kwargs)
        cond_pred = out[0] if isinstance(out, tuple) else out.sample
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))  # [] or [1] or [B] -> [B]
        text_norm, keep = self._judge(cond_pred.detach(), null_pred, timesteps, rows)
        if isinstance(out, tuple):
            return (*out, text_norm, keep)
        out["text_norm"], out["keep"] = text_norm, keep
        return out

    def null_prediction(self, sample: Tensor, timestep, kwargs: dict) -> Tensor:
        """Prediction for the empty prompt, [B, ...], without gradient; ``kwargs`` as for the conditional one."""
        return self._null_pass(sample, timestep, kwargs, None)

    @torch.no_grad()
    def _null_pass(self, sample: Tensor, timestep, kwargs: dict, rows: Sequence[int] | None) -> Tensor:
        wanted = len(sample) if rows is None else len(rows)
        if wanted < len(sample):
            if self._static_shapes:
                size = min(len(sample), 1 << (wanted - 1).bit_length())
                rows = [*rows, *[rows[-1]] * (size - wanted)]
            index = torch.tensor(rows).to(sample.device, non_blocking=True)
            sample, timestep, kwargs = _take((sample, timestep, kwargs), index, len(sample))
        if "encoder_attention_mask" not in self._null_names:  # the prompt's says nothing of the empty one's tokens
            kwargs = {name: value for name, value in kwargs.items() if name != "encoder_attention_mask"}
        kwargs = _merge(kwargs, self._null_names, self, len(sample)) | {"return_dict": False}
        device = sample.device.type
        # autocast caches a weight's cast, and one made here would have no gradient for the pass that follows
        with torch.autocast(
            device,
            enabled=torch.is_autocast_enabled(device),
            dtype=torch.get_autocast_dtype(device),
            cache_enabled=False,
        ):
            return self.unet(sample, timestep, **kwargs)[0][:wanted]


def _register_tree(module: nn.Module, tree: Mapping, name: str) -> dict:
    """Stores the tensors of a nested mapping as buffers that move with the module; returns their names, nested alike."""
    names = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            names[key] = _register_tree(module, value, f"{name}_{key}")
        else:
            names[key] = f"{name}_{key}"
            module.register_buffer(names[key], value.detach().clone(), persistent=False)
    return names


def _take(tree, index: Tensor, batch_size: int):
    """The rows of every tensor in a tree that has one for each sample; all else as it is."""
    if isinstance(tree, Tensor):
        return tree[index] if tree.ndim and len(tree) == batch_size else tree
    if isinstance(tree, Mapping):
        return {key: _take(value, index, batch_size) for key, value in tree.items()}
    return tuple(_take(part, index, batch_size) for part in tree) if isinstance(tree, list | tuple) else tree


def _merge(call: Mapping, names: Mapping, module: nn.Module, batch_size: int) -> dict:
    """The keyword arguments of the call with those of the empty prompt in their place, one row per sample."""
    merged = dict(call)
    for key, name in names.items():
        given = call.get(key)
        if isinstance(name, Mapping):
            merged[key] = _merge(given or {}, name, module, batch_size)
            continue
        null = getattr(module, name)
        if isinstance(given, Tensor):
            null = null.to(given) if null.is_floating_point() else null
            null = null if null.ndim == given.ndim else null.unsqueeze(0)
        elif null.ndim == 2 and key == "encoder_hidden_states":
            null = null.unsqueeze(0)
        merged[key] = null.expand(batch_size, *null.shape[1:])
    return merged


def _strip_prefix(module, state_dict, prefix, local_metadata):
    inner = f"{prefix}unet."
    for key in [k for k in state_dict if k.startswith(inner)]:
        state_dict[prefix + key[len(inner) :]] = state_dict.pop(key)


def _add_prefix(module, state_dict, prefix, *_):
    for key in [k for k in state_dict if k.startswith(prefix)]:
        state_dict[f"{prefix}unet.{key[len(prefix) :]}"] = state_dict.pop(key)
