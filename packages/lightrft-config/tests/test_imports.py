"""What importing the package costs."""

import subprocess
import sys


def test_importing_loads_neither_torch_nor_numpy_nor_yaml():
    code = "import sys, lightrft.config; print([m for m in ('torch', 'numpy', 'yaml') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_errors_are_also_the_standard_types():
    import lightrft.config as c

    pairs = [(c.ConfigError, ValueError), (c.ConfigFileError, OSError), (c.BackendNotInstalledError, ImportError), (c.StrategyError, RuntimeError),
             (c.CheckpointError, RuntimeError), (c.CheckpointNotFoundError, FileNotFoundError), (c.EngineError, RuntimeError),
             (c.StaleWeightsError, c.EngineError), (c.UnsupportedOperationError, NotImplementedError),
             (c.ArgumentError, ValueError), (c.ArgumentTypeError, TypeError)]  # fmt: skip
    for error, standard in pairs:
        assert issubclass(error, standard) and issubclass(error, c.LightRFTError)
