"""The SGLang engine, in a separate server process.

engine.py             the engine of a strategy; does not import SGLang
server_process.py     starts and ends the server process, and calls it
shared_memory.py      memory that both processes map, to transfer weights
server.py             runs in the server process: SGLang's engine
scheduler.py          runs in the processes that SGLang starts for the model
patches.py            patches of SGLang
launcher.py, launcher_client.py           servers that start as forks, for test suites
arguments.py, requests.py                 pure conversions
host_memory.py, seeded_sampling.py, unused_weights.py   used by the patches and the scheduler process
"""

from lightrft.engines.sglang.engine import SGLangEngine

__all__ = ["SGLangEngine"]
