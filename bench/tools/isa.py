"""The same measurement by every compiled build that runs here, each in a process of its own.

python bench/tools/isa.py [options of `neglog bench`]
"""

import os
import subprocess
import sys

from neglog import kernels


def main(arguments: list[str]) -> None:
    for build in kernels.isa_builds():
        if not build.usable:
            print(f"{build.name}: {build.why}")
            continue
        command = [sys.executable, "-m", "neglog", "bench", "cross_entropy", "--no-compile"]
        environment = os.environ | {"NEGLOG_ISA": build.name}
        subprocess.run([*command, *arguments], env=environment, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
