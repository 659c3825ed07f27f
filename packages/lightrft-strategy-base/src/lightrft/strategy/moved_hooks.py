"""Names of version 0.1: refuses a strategy that overrides a hook of it, and translates its capabilities."""

import warnings

MOVED = {
    "_join": "join", "_setup": "__init__", "_teardown": "close", "_check_model": "check_model", "_wrap": "wrap",
    "_create_optimizer": "create_optimizer", "_algorithm": "algorithm", "_bind": "bind",
    "_forward_context": "forward_context", "_leaves": "graph_leaves", "_backward": "backward",
    "_gradient_shards": "gradient_shards", "_update": "reduce or fused_step", "_settle": "reshard",
    "_gathered": "gathered", "_full_shape": "full_shape", "_shards": "shards", "_state_slices": "state_slices",
    "_refresh": "sync_from_master", "_resume_optimizer": "resume_optimizer", "_move_optimizer": "move_optimizer",
    "_move_model": "move_model", "adopts": "accepts_unprepared", "transparent": "transparent",
    "capabilities": "capabilities",
}  # fmt: skip
"""The strategy hooks of version 0.1, and the hook of `lightrft.strategy.backend.Backend` that replaces each."""


def check_moved_hooks(cls: type) -> None:
    """Raise `TypeError` if ``cls`` defines a hook of version 0.1."""
    for name in vars(cls):
        if name in MOVED:
            raise TypeError(
                f"{cls.__name__}.{name}: the hooks of a strategy moved to its backend in version 0.2. Derive a class "
                f"from lightrft.strategy.backend.ReplicatedBackend, override {MOVED[name]} there, and set "
                f"backend_class of {cls.__name__} to it"
            )
        if name == "honours":
            raise TypeError(f"{cls.__name__}.honours: it is called supported_settings since version 0.2. Rename it")


RENAMED_CAPABILITIES = {"adoption": "unprepared_models", "uneven_modules": "rank_dependent_modules"}


def current_capabilities(backend: object, capabilities: frozenset[str]) -> frozenset[str]:
    """Return the ``capabilities`` of ``backend`` under their current names. Warns of former ones."""
    former = sorted(RENAMED_CAPABILITIES.keys() & capabilities)
    if former:
        names = ", ".join(f"{old!r} is called {RENAMED_CAPABILITIES[old]!r}" for old in former)
        message = f"{type(backend).__name__}.capabilities: {names} since version 0.2. Use the new names"
        warnings.warn(message, DeprecationWarning, stacklevel=3)
    return frozenset(RENAMED_CAPABILITIES.get(name, name) for name in capabilities)
