"""The arithmetic limit of int8 inference: multiply-adds a second that one core can do with VNNI."""

import ctypes
import mmap
import platform
import time
from pathlib import Path

MACS_A_INSTRUCTION = 64
"""vpdpbusd on 512 bits: 16 sums of 4 products of a byte each."""
REGISTERS = 16
"""Independent sums, more than are under way at once on any CPU."""
TURNS, TRIES = 20_000, 50  # a try takes about 0.1 ms, less than what interrupts it is apart


def peak_macs_per_s() -> float | None:
    """Measured by a loop of nothing but vpdpbusd, on registers; None on a CPU without AVX-512 VNNI.

    It is what the clock allows at this moment: a number of instructions a cycle (one on Zen 4, two on
    Xeons) times the clock, boost included. The fastest try counts.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return None
    if "avx512_vnni" not in Path("/proc/cpuinfo").read_text().split():
        return None
    code = _loop()
    memory = mmap.mmap(-1, len(code), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    start = ctypes.c_char.from_buffer(memory)
    run = ctypes.CFUNCTYPE(None, ctypes.c_uint64)(ctypes.addressof(start))
    times_s = []
    for _ in range(TRIES):
        begin = time.perf_counter()
        run(TURNS)
        times_s.append(time.perf_counter() - begin)
    return TURNS * REGISTERS * MACS_A_INSTRUCTION / min(times_s)


def _loop() -> bytes:
    """Machine code of a C function (uint64 turns): registers zmm16 to zmm31, then count down."""
    body = b""
    for i in range(REGISTERS):
        high = 0xA2 if i < 8 else 0x02  # the upper bits of the three operands, all zmm(16 + i)
        body += bytes([0x62, high, (~i & 15) << 3 | 5, 0x40, 0x50, 0xC0 | (i & 7) * 9])
    body += b"\x48\xff\xcf"  # dec rdi
    back = -(len(body) + 6)
    return body + b"\x0f\x85" + back.to_bytes(4, "little", signed=True) + b"\xc3"  # jnz back; ret
