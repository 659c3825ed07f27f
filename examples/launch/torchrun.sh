#!/usr/bin/env bash
# Start a training script on this host. Run it on every host, with the same script and arguments:
#
#   NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=host-0:29500 ./torchrun.sh train.py --strategy fsdp
#
# NNODES           number of hosts; default 1
# NODE_RANK        number of this host, from 0; default 0
# RDZV_ENDPOINT    name or address of host 0 and a free port on it, reachable from all hosts
# NPROC_PER_NODE   ranks per host; default "gpu", one for each GPU. Set a number on hosts without GPUs
#
# On hosts with several network interfaces, also set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME.
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "torchrun.sh: expected a training script and its arguments, got none" >&2
    exit 2
fi
if [[ ${NNODES:-1} -gt 1 && (-z ${NODE_RANK:-} || -z ${RDZV_ENDPOINT:-}) ]]; then
    echo "torchrun.sh: expected NODE_RANK and RDZV_ENDPOINT, because NNODES is $NNODES" >&2
    exit 2
fi
# Seconds that ranks have for saving after SIGTERM, before torchrun kills them. Without it: 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

# torchrun itself ends with 1, whatever its ranks end with. This ends with 75 if a rank does, or after SIGTERM: start again.
launcher='
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

try:
    main()
except SignalException as error:
    print(error, file=sys.stderr)
    sys.exit(75 if error.sigval == signal.SIGTERM else 1)
except ChildFailedError as error:
    print(error, file=sys.stderr)
    _, failure = error.get_first_failure()
    sys.exit(75 if failure.exitcode == 75 else 1)
'
exec python -c "$launcher" --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --rdzv-endpoint "${RDZV_ENDPOINT:-127.0.0.1:29500}" --nproc-per-node "${NPROC_PER_NODE:-gpu}" "$@"
