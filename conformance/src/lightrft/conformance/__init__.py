"""The contract of LightRFT's strategies and engines, executed."""
