"""Compile kernels for an architecture without a GPU, and read what the code needs; not under the interpreter."""

import os
import re
import subprocess
import tempfile

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory that a program may use, by architecture.
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}


def compile_kernel(function, arch, constants, types, source=ASTSource, **options):
    """Compile with every pointer and stride divisible by 16, as the production shapes have them.

    `types` are those of pointers and floats by argument name, and of tuples; other arguments are int32.
    """
    signature, attributes = {}, {}
    if "EARLY" in function.arg_names:
        constants = {"EARLY": 0, **constants}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name, "i32")
        if isinstance(signature[name], tuple):
            attributes |= {(position, i): [["tt.divisibility", 16]] for i in range(len(signature[name]))}
        elif signature[name].startswith("*") or "stride" in name:
            attributes[(position,)] = [["tt.divisibility", 16]]
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    return triton.compile(source(function, signature, constants, attributes), target=target, options=options)


def stack_bytes(compiled):
    """Local memory of a thread, from the compiled code's own resource table."""
    folder = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [os.path.join(folder, "cuobjdump"), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", report).group(1))
