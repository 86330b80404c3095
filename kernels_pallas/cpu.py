"""Kernels for a CPU: machine code that LLVM makes for this processor, called by XLA as foreign functions.

Pallas has no CPU path, so a kernel is written in LLVM's intermediate representation (IR): a function that computes one
piece of the result, and the parts that stand here: threads that share the pieces out, and the reading of XLA's call.

`Kernel` puts them together. XLA's C interface for foreign functions (`xla/ffi/api/c_api.h` in `jax.ffi.include_dir()`)
is read by the offsets of a few old fields, the same in its versions 0.3 and 0.5 (jax 0.10 and 0.12).

Threads. Decoding is a chain of products of some ten to a hundred microseconds, each with all cores. Waking a sleeping
thread takes as long as one of them, so the threads here, unlike XLA's, look for the next job for a while before they
sleep, and give way meanwhile to whoever wants the core. There is one job at a time: who finds the threads taken
computes alone. The calling thread always takes part and waits only for pieces that others have begun.

Training is a graph of operations of a millisecond, some of which XLA's threads compute side by side. A thread more than
there are cores would slow all of them down, so long jobs are shared out among XLA's threads, those that are free.
"""

import ctypes
import dataclasses
import functools
import os
import platform
import threading
import warnings

import jax
from llvmlite import binding as llvm

from kernels_pallas.common import Unsupported
from kernels_pallas.cores import cores
from kernels_pallas.cpu_compile import compile_code

_ARM = platform.machine().lower() in ("arm64", "aarch64")
_MOST_HELPERS = 15
_LOOKS = 300  # for a job before a thread sleeps: about 0.1 to 0.3 ms
_PAUSE = ("llvm.aarch64.hint", "i32 1", "i32") if _ARM else ("llvm.x86.sse2.pause", "", "")
_PAUSES = 1000  # before who waits gives way
_LOADING = threading.RLock()  # a kernel is compiled and registered once, whichever threads ask for it first
_REGISTERED: set[str] = set()
# How a thread rounds and treats the smallest numbers is a register of its own: XLA's threads flush them to zero.
_DECLARE_MODE, _READ_MODE, _WRITE_MODE = (
    (
        "declare i64 @llvm.aarch64.get.fpcr()\ndeclare void @llvm.aarch64.set.fpcr(i64)",
        "%mode = call i64 @llvm.aarch64.get.fpcr()\n  store i64 %mode, ptr %mode.at",
        "%mode = load i64, ptr %mode.at\n  call void @llvm.aarch64.set.fpcr(i64 %mode)",
    )
    if _ARM
    else (
        "declare void @llvm.x86.sse.stmxcsr(ptr)\ndeclare void @llvm.x86.sse.ldmxcsr(ptr)",
        "call void @llvm.x86.sse.stmxcsr(ptr %mode.at)",
        "call void @llvm.x86.sse.ldmxcsr(ptr %mode.at)",
    )
)


# Work that threads share: 0 next piece, 1 pieces done, 2 pieces, 3 pieces taken at once, 4 helpers wanted, 5 the
# function of a piece, 6 its operand, 7 how the calling thread computes.
_JOB = "%job = type { i64, i64, i64, i64, i64, ptr, ptr, i64 }"

# The threads, one module for all kernels.
_POOL = f"""
{_JOB}
; A job and how many threads may still look at it.
%shared = type {{ %job, i64 }}
declare ptr @malloc(i64)
declare void @free(ptr)

@slot = internal global %job zeroinitializer, align 64
@epoch = internal global i64 0, align 64   ; odd while the job in the slot is open
@inside = internal global i64 0, align 64  ; helpers that look at the slot
@busy = internal global i64 0, align 64
@sleepers = internal global i64 0, align 64
@mutex = internal global [32 x i64] zeroinitializer, align 64
@wake = internal global [32 x i64] zeroinitializer, align 64

declare i32 @pthread_create(ptr, ptr, ptr, ptr)
declare i32 @pthread_detach(i64)
declare i32 @pthread_mutex_init(ptr, ptr)
declare i32 @pthread_mutex_lock(ptr)
declare i32 @pthread_mutex_unlock(ptr)
declare i32 @pthread_cond_init(ptr, ptr)
declare i32 @pthread_cond_wait(ptr, ptr)
declare i32 @pthread_cond_signal(ptr)
declare i32 @sched_yield()
{_DECLARE_MODE}
declare void @{_PAUSE[0]}({_PAUSE[2]})
declare i64 @llvm.smin.i64(i64, i64)

; Takes pieces until none is left.
define internal void @work(ptr %job) {{
entry:
  %next = getelementptr %job, ptr %job, i64 0, i32 0
  %done = getelementptr %job, ptr %job, i64 0, i32 1
  %count.at = getelementptr %job, ptr %job, i64 0, i32 2
  %count = load i64, ptr %count.at
  %at.once.at = getelementptr %job, ptr %job, i64 0, i32 3
  %at.once = load i64, ptr %at.once.at
  %function.at = getelementptr %job, ptr %job, i64 0, i32 5
  %function = load ptr, ptr %function.at
  br label %claim
claim:
  %first = atomicrmw add ptr %next, i64 %at.once monotonic
  %after = add i64 %first, %at.once
  %last = call i64 @llvm.smin.i64(i64 %after, i64 %count)
  %any = icmp slt i64 %first, %last
  br i1 %any, label %take, label %end
take:
  %index = phi i64 [ %first, %claim ], [ %index.next, %take ]
  call void %function(ptr %job, i64 %index)
  %index.next = add i64 %index, 1
  %more = icmp slt i64 %index.next, %last
  br i1 %more, label %take, label %finished
finished:
  %taken = sub i64 %last, %first
  atomicrmw add ptr %done, i64 %taken release
  br label %claim
end:
  ret void
}}

; Waits a moment: the core is left to others where it has lasted long.
define internal void @give.way(i64 %pauses) {{
entry:
  call void @{_PAUSE[0]}({_PAUSE[1]})
  %rest = urem i64 %pauses, {_PAUSES}
  %long = icmp eq i64 %rest, 0
  br i1 %long, label %yield, label %end
yield:
  call i32 @sched_yield()
  br label %end
end:
  ret void
}}

; Takes pieces, and waits for those that others have begun.
define internal void @finish(ptr %job) {{
entry:
  call void @work(ptr %job)
  %done.at = getelementptr %job, ptr %job, i64 0, i32 1
  %count.at = getelementptr %job, ptr %job, i64 0, i32 2
  %count = load i64, ptr %count.at
  br label %wait
wait:
  %pauses = phi i64 [ 0, %entry ], [ %pauses.next, %pause ]
  %done = load atomic i64, ptr %done.at acquire, align 8
  %all = icmp eq i64 %done, %count
  br i1 %all, label %end, label %pause
pause:
  %pauses.next = add i64 %pauses, 1
  call void @give.way(i64 %pauses.next)
  br label %wait
end:
  ret void
}}

; A forked process has no helping threads: its jobs find them taken for good.
define void @lathe_forked() {{
  store atomic i64 1, ptr @busy seq_cst, align 8
  ret void
}}

; Computes a job, whose fields 2 to 5 and operands are set, with as many helpers as are wanted and free.
define void @lathe_run(ptr %job) {{
entry:
  %wanted.at = getelementptr %job, ptr %job, i64 0, i32 4
  %wanted = load i64, ptr %wanted.at
  %some = icmp sgt i64 %wanted, 0
  br i1 %some, label %take, label %alone
take:
  %pair = cmpxchg ptr @busy, i64 0, i64 1 acquire monotonic
  %mine = extractvalue {{ i64, i1 }} %pair, 1
  br i1 %mine, label %publish, label %alone
alone:
  call void @work(ptr %job)
  ret void
publish:
  %mode.at = getelementptr %job, ptr %job, i64 0, i32 7
  {_READ_MODE}
  %content = load %job, ptr %job
  store %job %content, ptr @slot
  atomicrmw add ptr @epoch, i64 1 seq_cst
  %sleepers = load atomic i64, ptr @sleepers seq_cst, align 8
  %wakes = call i64 @llvm.smin.i64(i64 %sleepers, i64 %wanted)
  %any = icmp sgt i64 %wakes, 0
  br i1 %any, label %lock, label %own
lock:
  call i32 @pthread_mutex_lock(ptr @mutex)
  br label %signal
signal:
  %signals = phi i64 [ 0, %lock ], [ %signals.next, %signal ]
  call i32 @pthread_cond_signal(ptr @wake)
  %signals.next = add i64 %signals, 1
  %signals.more = icmp slt i64 %signals.next, %wakes
  br i1 %signals.more, label %signal, label %unlock
unlock:
  call i32 @pthread_mutex_unlock(ptr @mutex)
  br label %own
own:
  call void @finish(ptr @slot)
  ; Who still looks at the slot finds no piece, and leaves.
  atomicrmw add ptr @epoch, i64 1 seq_cst
  br label %leaving
leaving:
  %more = phi i64 [ 0, %own ], [ %more.next, %leaving.pause ]
  %inside = load atomic i64, ptr @inside seq_cst, align 8
  %none = icmp eq i64 %inside, 0
  br i1 %none, label %free, label %leaving.pause
leaving.pause:
  %more.next = add i64 %more, 1
  call void @give.way(i64 %more.next)
  br label %leaving
free:
  store atomic i64 0, ptr @busy release, align 8
  ret void
}}

; Takes pieces of a job that its caller may have left already.
define internal void @task(ptr %shared) {{
entry:
  %content = getelementptr %shared, ptr %shared, i64 0, i32 0
  call void @work(ptr %content)
  call void @leave(ptr %shared)
  ret void
}}

; The last who leaves a shared job clears it away.
define internal void @leave(ptr %shared) {{
entry:
  %users.at = getelementptr %shared, ptr %shared, i64 0, i32 1
  %users = atomicrmw sub ptr %users.at, i64 1 acq_rel
  %last = icmp eq i64 %users, 1
  br i1 %last, label %clear, label %end
clear:
  call void @free(ptr %shared)
  br label %end
end:
  ret void
}}

; Computes a job as `lathe_run`, with threads of XLA's.
define void @lathe_run_long(ptr %job, ptr %frame) {{
entry:
  %arguments = alloca [5 x i64]
  %failure = alloca [3 x i64]
  %wanted.at = getelementptr %job, ptr %job, i64 0, i32 4
  %wanted = load i64, ptr %wanted.at
  %shared = call ptr @malloc(i64 128)
  %content = getelementptr %shared, ptr %shared, i64 0, i32 0
  %users.at = getelementptr %shared, ptr %shared, i64 0, i32 1
  %job.content = load %job, ptr %job
  store %job %job.content, ptr %content
  %users = add i64 %wanted, 1
  store i64 %users, ptr %users.at
  %api.at = getelementptr i8, ptr %frame, i64 16
  %api = load ptr, ptr %api.at
  %context.at = getelementptr i8, ptr %frame, i64 24
  %context = load i64, ptr %context.at
  %schedule.at = getelementptr i8, ptr %api, i64 136
  %schedule = load ptr, ptr %schedule.at
  %destroy.at = getelementptr i8, ptr %api, i64 64
  %destroy = load ptr, ptr %destroy.at
  store i64 40, ptr %arguments
  %a.1 = getelementptr i64, ptr %arguments, i64 1
  store i64 0, ptr %a.1
  %a.2 = getelementptr i64, ptr %arguments, i64 2
  store i64 %context, ptr %a.2
  %a.3 = getelementptr i64, ptr %arguments, i64 3
  store ptr @task, ptr %a.3
  %a.4 = getelementptr i64, ptr %arguments, i64 4
  store ptr %shared, ptr %a.4
  br label %more
more:
  %made = phi i64 [ 0, %entry ], [ %made.next, %made.one ]
  %enough = icmp sge i64 %made, %wanted
  br i1 %enough, label %own, label %make
make:
  %error = call ptr %schedule(ptr %arguments)
  %failed = icmp ne ptr %error, null
  br i1 %failed, label %without, label %made.one
without:
  store i64 24, ptr %failure
  %f.1 = getelementptr i64, ptr %failure, i64 1
  store i64 0, ptr %f.1
  %f.2 = getelementptr i64, ptr %failure, i64 2
  store ptr %error, ptr %f.2
  call void %destroy(ptr %failure)
  atomicrmw sub ptr %users.at, i64 1 monotonic
  br label %made.one
made.one:
  %made.next = add i64 %made, 1
  br label %more
own:
  call void @finish(ptr %content)
  call void @leave(ptr %shared)
  ret void
}}

; What a helping thread does for ever.
define internal ptr @help(ptr %nothing) {{
entry:
  br label %look
look:
  %seen = phi i64 [ 0, %entry ], [ %seen.after, %again ]
  %looks = phi i64 [ 0, %entry ], [ %looks.after, %again ]
  %epoch = load atomic i64, ptr @epoch seq_cst, align 8
  %bit = and i64 %epoch, 1
  %open = icmp eq i64 %bit, 1
  %new = icmp ne i64 %epoch, %seen
  %job = and i1 %open, %new
  br i1 %job, label %enter, label %idle
enter:
  atomicrmw add ptr @inside, i64 1 seq_cst
  %still = load atomic i64, ptr @epoch seq_cst, align 8
  %same = icmp eq i64 %still, %epoch
  br i1 %same, label %ticket, label %leave
ticket:
  %wanted.at = getelementptr %job, ptr @slot, i64 0, i32 4
  %wanted = atomicrmw sub ptr %wanted.at, i64 1 monotonic
  %welcome = icmp sgt i64 %wanted, 0
  br i1 %welcome, label %work, label %leave
work:
  %mode.at = getelementptr %job, ptr @slot, i64 0, i32 7
  {_WRITE_MODE}
  call void @work(ptr @slot)
  br label %leave
leave:
  atomicrmw sub ptr @inside, i64 1 seq_cst
  br label %again
idle:
  %looks.next = add i64 %looks, 1
  %tired = icmp sge i64 %looks.next, {_LOOKS}
  br i1 %tired, label %sleep, label %yield
yield:
  call i32 @sched_yield()
  br label %again
sleep:
  call i32 @pthread_mutex_lock(ptr @mutex)
  atomicrmw add ptr @sleepers, i64 1 seq_cst
  br label %check
check:
  %now = load atomic i64, ptr @epoch seq_cst, align 8
  %nothing.new = icmp eq i64 %now, %epoch
  br i1 %nothing.new, label %wait, label %awake
wait:
  call i32 @pthread_cond_wait(ptr @wake, ptr @mutex)
  br label %check
awake:
  atomicrmw sub ptr @sleepers, i64 1 seq_cst
  call i32 @pthread_mutex_unlock(ptr @mutex)
  br label %again
again:
  %seen.after = phi i64 [ %epoch, %leave ], [ %seen, %yield ], [ %seen, %awake ]
  %looks.after = phi i64 [ 0, %leave ], [ %looks.next, %yield ], [ 0, %awake ]
  br label %look
}}

; Starts helping threads; returns how many there are.
define i64 @lathe_start(i64 %count) {{
entry:
  %thread = alloca i64
  call i32 @pthread_mutex_init(ptr @mutex, ptr null)
  call i32 @pthread_cond_init(ptr @wake, ptr null)
  br label %more
more:
  %made = phi i64 [ 0, %entry ], [ %made.next, %detach ]
  %enough = icmp sge i64 %made, %count
  br i1 %enough, label %end, label %create
create:
  %error = call i32 @pthread_create(ptr %thread, ptr null, ptr @help, ptr null)
  %failed = icmp ne i32 %error, 0
  br i1 %failed, label %end, label %detach
detach:
  %id = load i64, ptr %thread
  call i32 @pthread_detach(i64 %id)
  %made.next = add i64 %made, 1
  br label %more
end:
  ret i64 %made
}}
"""

# What stands beside the code of every kernel.
_CALL = f"""
{_JOB}

declare void @lathe_run(ptr)
declare void @lathe_run_long(ptr, ptr)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.smax.i64(i64, i64)

; Answers XLA's question which version of the interface this code was written for: true where it was one.
define internal i1 @describe(ptr %frame) {{
entry:
  %extension.at = getelementptr i8, ptr %frame, i64 8
  %extension = load ptr, ptr %extension.at
  %any = icmp ne ptr %extension, null
  br i1 %any, label %which, label %no
which:
  %type.at = getelementptr i8, ptr %extension, i64 8
  %type = load i32, ptr %type.at
  %asked = icmp eq i32 %type, 1
  br i1 %asked, label %answer, label %no
answer:
  %metadata.at = getelementptr i8, ptr %extension, i64 24
  %metadata = load ptr, ptr %metadata.at
  %major = getelementptr i8, ptr %metadata, i64 24
  store i32 0, ptr %major
  %minor = getelementptr i8, ptr %metadata, i64 28
  store i32 3, ptr %minor
  %traits = getelementptr i8, ptr %metadata, i64 32
  store i32 0, ptr %traits
  ret i1 true
no:
  ret i1 false
}}

; Fills in a job: `function(job, index)` computes `count` pieces with the operand, by the calling thread and by as many
; others as `pay`. A thread takes about `takes` times; 0: a piece at once.
define internal void @fill(ptr %job, ptr %function, ptr %operand, i64 %count, i64 %pay, i64 %takes) {{
entry:
  %count.less = sub i64 %count, 1
  %helpers.all = call i64 @llvm.smin.i64(i64 %pay, i64 %count.less)
  %helpers.some = call i64 @llvm.smax.i64(i64 %helpers.all, i64 0)
  %helpers = call i64 @llvm.smin.i64(i64 %helpers.some, i64 {cores() - 1})
  %threads = add i64 %helpers, 1
  %takes.all = mul i64 %threads, %takes
  %single = icmp eq i64 %takes, 0
  %divisor.any = select i1 %single, i64 %count, i64 %takes.all
  %nothing = icmp eq i64 %divisor.any, 0
  %divisor = select i1 %nothing, i64 1, i64 %divisor.any
  %divisor.less = sub i64 %divisor, 1
  %sum = add i64 %count, %divisor.less
  %at.once = udiv i64 %sum, %divisor
  store %job zeroinitializer, ptr %job
  %job.count = getelementptr %job, ptr %job, i64 0, i32 2
  store i64 %count, ptr %job.count
  %job.at.once = getelementptr %job, ptr %job, i64 0, i32 3
  store i64 %at.once, ptr %job.at.once
  %job.helpers = getelementptr %job, ptr %job, i64 0, i32 4
  store i64 %helpers, ptr %job.helpers
  %job.function = getelementptr %job, ptr %job, i64 0, i32 5
  store ptr %function, ptr %job.function
  %job.operand = getelementptr %job, ptr %job, i64 0, i32 6
  store ptr %operand, ptr %job.operand
  ret void
}}

; Computes a short job (`@fill`): by the threads that look for one.
define internal void @share(ptr %function, ptr %operand, i64 %count, i64 %pay, i64 %takes) {{
entry:
  %job = alloca %job
  call void @fill(ptr %job, ptr %function, ptr %operand, i64 %count, i64 %pay, i64 %takes)
  call void @lathe_run(ptr %job)
  ret void
}}

; Computes a long job (`@fill`), of a millisecond or so: by XLA's threads, a piece at once.
define internal void @share.long(ptr %frame, ptr %function, ptr %operand, i64 %count, i64 %pay) {{
entry:
  %job = alloca %job
  call void @fill(ptr %job, ptr %function, ptr %operand, i64 %count, i64 %pay, i64 0)
  call void @lathe_run_long(ptr %job, ptr %frame)
  ret void
}}

; Operand or result `number` of a call: arguments 0, 1, ..., results -1, -2, ...
define internal ptr @buffer(ptr %frame, i64 %number) {{
  %result = icmp slt i64 %number, 0
  %offset = select i1 %result, i64 112, i64 72
  %not = xor i64 %number, -1
  %index = select i1 %result, i64 %not, i64 %number
  %list.at = getelementptr i8, ptr %frame, i64 %offset
  %list = load ptr, ptr %list.at
  %at = getelementptr ptr, ptr %list, i64 %index
  %buffer = load ptr, ptr %at
  ret ptr %buffer
}}

define internal ptr @data(ptr %buffer) {{
  %at = getelementptr i8, ptr %buffer, i64 24
  %data = load ptr, ptr %at
  ret ptr %data
}}

define internal i64 @dim(ptr %buffer, i64 %axis) {{
  %at = getelementptr i8, ptr %buffer, i64 40
  %dims = load ptr, ptr %at
  %dim.at = getelementptr i64, ptr %dims, i64 %axis
  %dim = load i64, ptr %dim.at
  ret i64 %dim
}}

; XLA_FFI_Handler: nothing to do but in the stage of execution (3)
define ptr @handler(ptr %frame) {{
entry:
  %asked = call i1 @describe(ptr %frame)
  %stage.at = getelementptr i8, ptr %frame, i64 32
  br i1 %asked, label %end, label %stage
stage:
  %stage.is = load i32, ptr %stage.at
  %execute = icmp eq i32 %stage.is, 3
  br i1 %execute, label %call, label %end
call:
  call void @execute(ptr %frame)
  br label %end
end:
  ret ptr null
}}
"""


@functools.cache
def lanes() -> int:
    """Floats of a vector register of this processor.

    Raises Unsupported for one without fused multiply-add of vectors, and on systems without POSIX threads.
    """
    if os.name != "posix":
        raise Unsupported("kernels for a CPU need POSIX threads")
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    if features.get("avx2") and features.get("fma"):
        return 8
    if _ARM:
        return 4
    raise Unsupported(f"{llvm.get_host_cpu_name()} has neither AVX2 with FMA nor AVX-512 nor NEON")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One foreign function.

    name: XLA's name of it.
    code: IR that defines `void @execute(ptr %frame)`, which reads its buffers with `@buffer`, `@data` and `@dim`, and
        calls `@share` or `@share.long`; and the function of a piece, `void @...(ptr %job, i64 %index)`.
    """

    name: str
    code: str

    @functools.cached_property
    def engine(self) -> llvm.ExecutionEngine:
        """The machine code."""
        with _LOADING:
            _start_threads()
            return compile_code(_CALL + self.code)

    def register(self) -> str:
        """Makes the code known to XLA, once; returns `name`. Threads may ask for the same kernel at once.

        Raises Unsupported where XLA refuses it.
        """
        with _LOADING:
            if self.name not in _REGISTERED:
                self._register()
                _REGISTERED.add(self.name)
        return self.name

    def _register(self) -> None:
        new_capsule = ctypes.pythonapi.PyCapsule_New
        new_capsule.restype = ctypes.py_object
        new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        capsule = new_capsule(self.engine.get_function_address("handler"), None, None)
        # Before there is a backend, a refusal would come only when it starts, and as its failure.
        jax.devices("cpu")
        try:
            jax.ffi.register_ffi_target(self.name, capsule, platform="cpu")
        except Exception as error:  # whatever XLA's registry raises: its interface has changed
            raise Unsupported(f"XLA refuses a function written for its interface 0.3: {error}") from error


@functools.cache
def _start_threads() -> llvm.ExecutionEngine:
    """Starts a thread for all cores that this process may use but one, 15 at most; returns their code."""
    engine = compile_code(_POOL)
    for name in ("lathe_run", "lathe_run_long"):
        llvm.add_symbol(name, engine.get_function_address(name))
    start = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(engine.get_function_address("lathe_start"))
    wanted = min(cores() - 1, _MOST_HELPERS)
    if (started := start(wanted)) < wanted:
        warnings.warn(f"the system gave {started} of {wanted} threads for short kernels", stacklevel=2)
    os.register_at_fork(after_in_child=ctypes.CFUNCTYPE(None)(engine.get_function_address("lathe_forked")))
    return engine
