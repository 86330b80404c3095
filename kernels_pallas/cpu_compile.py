"""From LLVM's intermediate representation to machine code, for the kernels of a CPU."""

import ctypes
import hashlib
import os
import tempfile
import warnings
from pathlib import Path

import jax
from llvmlite import binding as llvm

_LEVEL = 3  # of LLVM's optimizations
_MADE = 1  # to be raised where `compile_code` makes other machine code of the same source


def compile_code(code: str) -> llvm.ExecutionEngine:
    """The machine code of a module of IR for this processor, kept from one process to the next."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=name, features=features, opt=_LEVEL, jit=True)
    module = llvm.parse_assembly(code)
    kept = _Kept("\n".join([code, target.triple, name, features, str(llvm.llvm_version_info), str(_MADE)]))
    if kept.code is None:
        module.verify()
        builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=_LEVEL))
        builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.set_object_cache(lambda _, code: kept.write(code), lambda _: kept.code)
    engine.finalize_object()
    # XLA and threads run the code for good, also when the module that made it is loaded again: it is never freed.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
    return engine


class _Kept:
    """Machine code in the directory in which jax keeps its programs, if it is a local one: LLVM takes a tenth of a
    second and more for a kernel, which a program's start would have to wait for each time."""

    def __init__(self, source: str) -> None:
        directory = jax.config.jax_compilation_cache_dir
        self._path = None
        if directory and "://" not in directory and jax.config.jax_enable_compilation_cache:
            self._path = Path(directory) / "lathe_kernels" / hashlib.sha256(source.encode()).hexdigest()
        self.code = self._read()

    def _read(self) -> bytes | None:
        """None where it isn't there, or was written by half."""
        try:
            content = self._path.read_bytes() if self._path else b""
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            warnings.warn(f"the kept machine code of a kernel can't be read: {error}", stacklevel=2)
            return None
        size = hashlib.sha256().digest_size
        code = content[size:]
        return code if code and hashlib.sha256(code).digest() == content[:size] else None

    def write(self, code: bytes) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._path.parent) as folder:  # nothing is left of a failed write
                written = Path(folder) / self._path.name
                written.write_bytes(hashlib.sha256(code).digest() + code)
                os.replace(written, self._path)
        except OSError as error:
            warnings.warn(f"the machine code of a kernel can't be kept: {error}", stacklevel=2)
