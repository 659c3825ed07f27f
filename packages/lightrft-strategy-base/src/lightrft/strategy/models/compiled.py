"""Models that were compiled with ``torch.compile``: the model inside, compiled in place.

``torch.compile(module)`` returns a wrapper, whose name is in every parameter's name, and which calls the module past
its class. Backends need the module itself, under its own names. ``nn.Module.compile`` compiles in place, without a
wrapper; here the same is done with the compiler of the wrapper.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``module`` is the wrapper that ``torch.compile`` returns."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # slow to import, and imported if anything was compiled
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of ``torch.compile``, or ``module`` itself."""
    while is_compiled(module):
        module = module._orig_mod  # type: ignore[assignment]
    return module


def compile_in_place(model: nn.Module, inner: nn.Module) -> None:
    """Compile ``inner``, and every submodule that is compiled, in place instead of in a wrapper. Idempotent.

    A wrapper that the caller holds calls the module that is compiled in place.

    Args:
        model: The model as the caller passes it: ``inner``, its wrapper of ``torch.compile``, or an actor, compiled or
            with a compiled ``.model``.
        inner: The model to prepare.
    """
    if is_compiled(model):
        _move(model, target=inner)
    outer: Any = uncompiled(model)
    if outer is not inner and is_compiled(outer.model):
        _move(outer.model, target=inner)
    for parent in list(inner.modules()):
        for name, child in parent._modules.items():
            if child is not None and is_compiled(child):
                _move(child, target=uncompiled(child))
                parent._modules[name] = uncompiled(child)


def replace_inner(model: nn.Module, inner: nn.Module, wrapped: nn.Module) -> nn.Module:
    """Put ``wrapped`` in the place of ``inner`` in ``model``, and return what the caller calls from now on."""
    outer = uncompiled(model)
    if outer is not inner:
        outer.model = wrapped
        return model
    if model is inner:
        return wrapped
    _redirect(model, wrapped)
    return model


def _move(wrapper: Any, target: Any) -> None:
    """Compile ``target`` with the compiler of ``wrapper``, which then calls the module that it wraps."""
    if target._compiled_call_impl is None:
        of_torch = type(target).forward.__module__.startswith("torch.")
        target._compiled_call_impl = wrapper.dynamo_ctx(_frame_around(target) if of_torch else target._call_impl)
    _redirect(wrapper, uncompiled(wrapper))


def _frame_around(target: Any) -> Callable[..., Any]:
    """Return a function that calls ``target``, a module of torch: the compiler skips frames of torch's own code."""
    return lambda *args, **kwargs: target._call_impl(*args, **kwargs)


def _redirect(wrapper: Any, target: nn.Module) -> None:
    wrapper.forward = lambda *args, **kwargs: target(*args, **kwargs)


def eagerly(module: nn.Module) -> AbstractContextManager[object]:
    """Return the context in which ``module``, if a part of it is compiled, runs without its compiler."""
    return torch.compiler.set_stance("force_eager") if _has_compiled_part(module) else nullcontext()


def not_compiled(function: Callable[P, R], module: nn.Module) -> Callable[P, R]:
    """Return ``function``, which ``module`` calls, so that a compiler of the module does not trace it."""
    disabled: Callable[P, R] = torch.compiler.disable(function) if _has_compiled_part(module) else function
    return disabled


def _has_compiled_part(module: nn.Module) -> bool:
    return any(part._compiled_call_impl is not None for part in module.modules())
