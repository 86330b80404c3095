"""Many processes, one run: joining it, agreeing on what one of them knows, and ending when one is lost.

Each process owns some of the devices. jax's own runtime connects them: process 0 keeps a coordination service, every
process sends it signs of life, and collectives run between the devices. On a cluster that starts the same command on
every host, nothing need be said; elsewhere three flags say it. See docs/scale.md.
"""

import atexit
import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # see `_coordinator`

from research.errors import UserError

PATIENCE = 30  # seconds without a sign of life after which a process counts as lost
CONTINUES = (
    75  # exit code (EX_TEMPFAIL) of a process that ended before the run did: the same command continues
)
ASSEMBLY = 300  # seconds within which all processes must have come
_MESSAGE = 2048  # bytes of an error that all processes are told
_CONNECT = 60.0  # seconds within which all processes must have connected
_GRACE = 1.0  # seconds that the others have to say why they end
_DONE = b"\0"


def cluster(environment: Mapping[str, str] | None = None) -> str | None:
    """What started this process as one of many: its name, or `None` for a process of its own.

    environment: by default that of this process. A SLURM allocation of one task, a TPU host without others and a pod
    that is no job with a completion index are processes of their own.
    """
    found = os.environ if environment is None else environment
    if "JAX_COORDINATOR_ADDRESS" in found:
        return "JAX_COORDINATOR_ADDRESS"
    if int(found.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in found:
        return "SLURM"
    if "MEGASCALE_COORDINATOR_ADDRESS" in found:
        return "TPU slices"
    if "," in found.get("TPU_WORKER_HOSTNAMES", ""):
        return "a TPU slice on GKE"
    if "KUBERNETES_SERVICE_HOST" in found and "JOB_COMPLETION_INDEX" in found:
        return "a Kubernetes job"
    if "," in found.get("TPU_PROCESS_ADDRESSES", ""):
        return "a TPU slice"
    return "a Cloud TPU VM" if environment is None and _on_tpu_vm() else None


def _on_tpu_vm() -> bool:
    """Whether this machine has TPU chips: its metadata then says whether it is one host of several."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    return os.path.exists("/dev/accel0") and "TPU_SKIP_MDS_QUERY" not in os.environ


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    patience: int = PATIENCE,
) -> bool:
    """Joins the run that this process is part of, before the first use of a device. Returns whether there is one.

    coordinator: `host:port` of process 0, the same for all; num_processes, process_id: how many, and which one. All
    three or none: without them the cluster says so, and a process that none started stays alone. patience: seconds
    after which a process that gives no sign of life is given up, and the run with it.

    Raises `UserError` for flags that say half, and where the others can't be reached. If they have not all come after
    `ASSEMBLY` seconds the process says so and ends with `CONTINUES`.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if any(value is not None for value in given.values()):
        if missing := [f"--{name}" for name, value in given.items() if value is None]:
            raise UserError(f"{' and '.join(missing)}: also needed; a run is joined with all three, or none")
        if not 0 <= process_id < num_processes:
            raise UserError(
                f"--process_id={process_id}: of {num_processes} processes, 0 to {num_processes - 1}"
            )
        if ":" not in coordinator:
            raise UserError(f"--coordinator={coordinator}: expected host:port")
        where = f"--coordinator={coordinator}"
    elif (where := cluster()) is None:
        return False
    # This and `ending_together` tell it better; jax aborts the process without a word to a person.
    late = threading.Timer(ASSEMBLY, _stay_alone, (where,))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            *given.values(), initialization_timeout=2 * ASSEMBLY, heartbeat_timeout_seconds=2 * patience
        )
    except (ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        hint = "; is jax[k8s] installed?" if "Kubernetes" in where else ""
        raise UserError(f"{where}: the other processes of this run can't be joined: {line}{hint}") from error
    finally:
        late.cancel()
    return True


def _stay_alone(where: str) -> None:
    print(
        f"error: {where}: not all processes of this run came within {ASSEMBLY} seconds; start all of them again with "
        "the same command",
        file=sys.stderr,
    )
    _leave(CONTINUES)


def _coordinator() -> str:
    """The host at which process 0 was reached. jax 0.10 says so nowhere in public: `jax.distributed` can only
    initialize and shut down, and of a cluster that it recognised itself nobody else knows the address."""
    return distributed.global_state.coordinator_address.rpartition(":")[0].strip("[]")


@contextlib.contextmanager
def ending_together(patience: int = PATIENCE) -> Iterator[None]:
    """Between the processes of a run: when one ends before it should, the others say so and end too.

    A process that is killed, or fails, is noticed at once, since the connection that it held is closed; a host that
    vanishes, after `patience` seconds. Whoever lost another process exits with `CONTINUES`. Without this they would
    wait for it in a collective, and one that failed for the others at its exit.
    """
    if jax.process_count() == 1:
        yield
        return
    lifeline = _Lifeline(patience)
    try:
        yield
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0][:200]
        if not isinstance(error, UserError) and _is_loss(error):
            # A collective may notice it first; whose connection was closed is known a moment later.
            time.sleep(2 * _GRACE)
            _leave_soon(CONTINUES)
            raise UserError(f"{_lost('another process')} ({first_line})") from error
        code = error.exit_code if isinstance(error, UserError) else 2 if isinstance(error, OSError) else 1
        _leave_soon(code)
        lifeline.release(f"{code} process {jax.process_index()} ({first_line or type(error).__name__})")
        if jax.process_index() == 0:
            time.sleep(_GRACE)  # jax aborts the others as soon as this one is gone
        raise
    except BaseException:
        lifeline.release()
        raise
    lifeline.release()


def _is_loss(error: BaseException) -> bool:
    """Whether a collective failed because somebody no longer takes part."""
    words = ("gloo", "connection closed", "connection reset", "heartbeat", "coordination service", "nccl")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error).lower() for word in words)


def _lost(who: str) -> str:
    return (
        f"process {jax.process_index()} of {jax.process_count()} ends: {who} of this run was lost; start all of them "
        "again with the same command, to continue from the last checkpoint"
    )


def _leave_soon(code: int) -> None:
    """Ends the process once its error has been told, whatever still waits for the others: jax at the exit, a
    thread."""
    atexit.register(_leave, code)  # registered last, so it runs before jax's own

    def end() -> None:
        time.sleep(5 * _GRACE)
        _leave(code)

    # Python waits for threads that are no daemons before it comes to what is registered.
    threading.Thread(target=end, name="leave", daemon=True).start()


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Lifeline:
    """A connection of every process with process 0, which the system closes with the process that holds it.

    Process 0 listens; the others send a secret, their number and later, when they are done, `_DONE`. Before process 0
    gives up it tells them whom it lost.
    """

    def __init__(self, patience: int):
        self._patience, self._released = patience, threading.Event()
        self._links: dict[int, socket.socket] = {}
        note = np.zeros(18, np.uint8)  # 16 bytes of secret, 2 of the port
        listener = None
        if jax.process_index() == 0:
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            listener = socket.create_server(
                ("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=jax.process_count()
            )
            port = listener.getsockname()[1].to_bytes(2, "big")
            note = np.frombuffer(secrets.token_bytes(16) + port, np.uint8)
        note = bytes(same(note))
        if listener is not None:
            with listener:
                self._accept(listener, note[:16])
        else:
            self._connect(note)
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def release(self, failure: str = "") -> None:
        """The run is over here: whoever ends from now on may. The others are told, also of a failure, with its
        code."""
        self._released.set()
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.sendall(failure.encode() or _DONE)

    def _accept(self, listener: socket.socket, secret: bytes) -> None:
        listener.settimeout(_CONNECT)
        while len(self._links) < jax.process_count() - 1:
            try:
                link = listener.accept()[0]
                link.settimeout(_CONNECT)
                greeting = _receive(link, 20)
            except OSError as error:
                raise UserError(f"a process of this run did not call process 0: {error}") from error
            if greeting[:16] == secret:
                self._keep(int.from_bytes(greeting[16:], "big"), link)
            else:
                link.close()

    def _connect(self, note: bytes) -> None:
        host = _coordinator()  # where the coordination service was reached, so is this
        try:
            link = socket.create_connection((host, int.from_bytes(note[16:], "big")), timeout=_CONNECT)
        except OSError as error:
            raise UserError(f"process 0 of this run can't be reached at {host}: {error}") from error
        link.sendall(note[:16] + jax.process_index().to_bytes(4, "big"))
        self._keep(0, link)

    def _keep(self, process: int, link: socket.socket) -> None:
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Four questions that nobody answers, over `patience` seconds; not every system can be told.
        for option, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 4), ("TCP_KEEPCNT", None)):
            if hasattr(socket, option):
                number = 3 if value is None else max(1, self._patience // value)
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), number)
        self._links[process] = link

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    try:
                        said = key.fileobj.recv(4096)
                    except OSError:
                        said = b""
                    if said != _DONE:
                        self._give_up(key.data, said)
                    selector.unregister(key.fileobj)

    def _give_up(self, process: int, said: bytes) -> None:
        if self._released.is_set():
            return
        told = said.decode(errors="replace") or f"{CONTINUES} process {process}"
        for other, link in self._links.items():
            if other != process:
                with contextlib.suppress(OSError):
                    link.sendall(told.encode())
        code, _, who = told.partition(" ")
        # What every process would fail with again, such as a mistake, ends all of them with the same code.
        failed = f"process {jax.process_index()} of {jax.process_count()} ends: {who} failed"
        print(f"error: {_lost(who) if int(code) == CONTINUES else failed}", file=sys.stderr)
        _leave(int(code))


def _receive(link: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (part := link.recv(count - len(data))):
        data += part
    return data


def first_decides(action: Callable[[], Any]) -> Any:
    """Runs `action` in process 0 and returns there what it gives, elsewhere `None`.

    A `UserError` of process 0 is raised by every process. All must call it.
    """
    if jax.process_count() == 1:
        return action()
    from jax.experimental import multihost_utils

    result, failure = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except UserError as error:
            failure = error
    text = np.zeros(_MESSAGE, np.uint8)
    if failure is not None:
        encoded = np.frombuffer(str(failure).encode()[:_MESSAGE], np.uint8)
        text[: len(encoded)] = encoded
    told = bytes(multihost_utils.broadcast_one_to_all(text)).rstrip(b"\0").decode(errors="replace")
    if failure is not None:
        raise failure
    if told:
        raise UserError(f"process 0: {told}")
    return result


def same(values: Any) -> Any:
    """Numbers as process 0 has them. All must call it, with arrays of the same shape."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(values)


def any_of(flag: bool) -> bool:
    """Whether `flag` is set in any process. All must call it."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))
