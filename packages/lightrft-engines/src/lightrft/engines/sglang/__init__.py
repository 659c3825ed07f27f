"""The SGLang engine, beside this process.

engine.py      what a strategy holds; it imports no SGLang
process.py     the server process: its start, its end, and calls into it
shared.py      memory that both processes see, through which weights go
server.py      runs in the server process: SGLang's engine
scheduler.py   runs in the processes that SGLang starts for the model
arguments.py, requests.py, library.py   pure translations, and what of SGLang is used
"""

from lightrft.engines.sglang.engine import SGLangEngine

__all__ = ["SGLangEngine"]
