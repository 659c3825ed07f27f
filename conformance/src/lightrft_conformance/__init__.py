"""What starts `lightrft.conformance`: the command and the pytest plugin.

It is outside the namespace `lightrft`, which a clone of LightRFT on sys.path hides: the command then says so, and pytest
runs the tests of the clone.
"""
