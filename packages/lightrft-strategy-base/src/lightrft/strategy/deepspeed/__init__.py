"""LightRFT's module paths, for scripts written for it; see docs/migrating.md."""
