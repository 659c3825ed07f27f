"""What importing costs, and what is public."""

import subprocess
import sys

import lightrft.deepspeed


def test_importing_loads_no_deepspeed_and_asks_for_no_device() -> None:
    program = (
        "import sys, torch\n"
        "torch.cuda.is_available = torch.cuda.device_count = lambda: sys.exit('asked for CUDA')\n"
        "import lightrft.deepspeed\n"
        "sys.exit('deepspeed' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_public_names_are_these() -> None:
    assert lightrft.deepspeed.__all__ == ["DeepspeedStrategy"]
    assert lightrft.deepspeed.DeepspeedStrategy.name == "deepspeed"
