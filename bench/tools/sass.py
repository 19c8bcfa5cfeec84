"""Instructions of the CUDA kernels' hot loops, read from their machine code; needs no GPU.

python bench/tools/sass.py [FOLDER] [--architecture sm_90a]

FOLDER is one that csrc/compile.sh has built (build/cuda). Needs cuobjdump and nvdisasm in PATH, of
the CUDA toolkit or of `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`.

A loop that reads vectors of 16 bytes reads a known number of elements each time round, so its
instructions by element are exact. What they allow is a bound, not a measurement: a multiprocessor
issues at most 4 x 32 of them a clock, and a kernel that moves its bytes at the copy rate must get
by with fewer. Copy rate, clock and multiprocessors are an H200's (4.3 TB/s, 1.755 GHz, 132).
"""

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

COPY_BYTES, CLOCK, MULTIPROCESSORS = 4.3e12, 1.755e9, 132
ISSUED = 4 * 32 * CLOCK * MULTIPROCESSORS
VECTOR = 16
ITEMSIZE = {"__nv_bfloat16": 2, "__half": 2, "float": 4, "double": 8}
# Kernels, the passes over the elements that they make, and what they are for.
PASSES = {
    "forward_rows": (1, "nll forward"),
    "backward_rows": (2, "nll backward"),
    "forward_backward_rows_in_shared": (2, "nll in one pass, a row in shared memory"),
    "forward_cells_one_exp": (1, "pairs forward, scores close together"),
    "backward_cells_one_exp": (2, "pairs backward, the same"),
}


class Instruction(NamedTuple):
    address: int
    text: str  # without its predicate

    @property
    def name(self) -> str:
        return self.text.split()[0]

    @property
    def target(self) -> int | None:
        """Where it jumps to."""
        found = re.match(r"BRA\S*\s.*?(0x[0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None


class Loop(NamedTuple):
    instructions: int
    elements: int
    exps: int


def disassembled(tool: str, file: Path, architecture: str) -> Iterator[tuple[str, list]]:
    """Kernels, demangled, and their instructions."""
    command = [tool, "-sass", "-arch", architecture, str(file)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\S+\s+)?(\S[^;]*?)\s*;", body, re.M)
        yield demangled(name), [Instruction(int(at, 16), code) for at, code in lines]


def demangled(name: str) -> str:
    full = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    full = full.replace("neglog::(anonymous namespace)::", "").replace("(Scoring)", "")
    return full.removeprefix("void ").split("(")[0]


def hot_loops(code: list[Instruction], itemsize: int) -> list[Loop]:
    """The innermost loops that take exps of vectors, read from global or from shared memory."""
    spans = [(i.target, i.address) for i in code if i.target is not None and i.target < i.address]
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    loops = []
    for first, last in inner:
        names = [i.name for i in code if first <= i.address <= last]
        vectors = sum(bool(re.match(r"LD[GS]?\..*128", name)) for name in names)
        exps = sum(name == "MUFU.EX2" for name in names)
        elements = vectors * VECTOR // itemsize
        if elements and exps >= elements:
            loops.append(Loop(len(names), elements, exps))
    return loops


def report(kernel: str, code: list[Instruction]) -> str | None:
    """A line: instructions by element, and the share of the copy's time that issuing them takes."""
    found = re.match(r"(\w+)<(\w+)(, 0)?>$", kernel)  # of scores that are the logits
    if not found or found[1] not in PASSES:
        return None
    itemsize, (passes, what) = ITEMSIZE[found[2]], PASSES[found[1]]
    loops = hot_loops(code, itemsize)
    if not loops:  # double has no such exps; else nvcc has split the vectors
        return None if itemsize == 8 else f"{what:<40} {found[2]:<14} no loop loads whole vectors"
    if "shared" not in found[1]:  # the widest is the one that whole rows take, without statistics
        loops = [max(loops, key=lambda loop: (loop.elements, -loop.instructions))]
    by_element = sum(loop.instructions / loop.elements for loop in loops)
    share = by_element / ISSUED / (passes * itemsize / COPY_BYTES)
    exps = sum(loop.exps / loop.elements for loop in loops)
    return f"{what:<40} {found[2]:<14} {by_element:>6.1f} {exps:>6.2f} {share:>8.0%}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build/cuda"))
    parser.add_argument("--architecture", default="sm_90a")
    options = parser.parse_args()
    of_pip = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin")
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=of_pip)
    files = sorted(options.folder.glob("*.o"))
    if not tool or not files:
        packages = "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        missing = packages if files else f"csrc/compile.sh {options.folder}"
        print(f"bench/tools/sass.py: nothing to read: run {missing} first", file=sys.stderr)
        return 2
    print(
        f"{'loop, ' + options.architecture:<40} {'':<14} {'instr.':>6} {'exps':>6} {'of copy':>8}"
    )
    for file in files:
        for kernel, code in disassembled(tool, file, options.architecture):
            line = report(kernel, code)
            if line:
                print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
