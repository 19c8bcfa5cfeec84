#!/bin/sh
# One call on a bare GPU machine with Python, torch (CUDA), nvcc and a C++ compiler, under 9 minutes:
# compile for this GPU, check every op against the float64 oracle, run compute-sanitizer over the small
# shapes, measure. The table comes last; $OUT (build/device by default) gets device.json and the logs.
#
# Not yet run on a GPU. What it checks runs on the CPU too: python bench/device.py check --device cpu
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-build/device}
mkdir -p "$out"

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv
"$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
# Without the CPU kernels, to which nothing here is held: only the schemas and the Python are needed.
NEGLOG_COMPILE=0 "$python" -m pip install --quiet --no-build-isolation --no-deps --target "$out/site" . \
    || { "$python" -m pip install --quiet 'setuptools>=77' 'cython>=3.1' \
         && NEGLOG_COMPILE=0 "$python" -m pip install --quiet --no-build-isolation --no-deps \
                --target "$out/site" .; }
export PYTHONPATH="$PWD/$out/site${PYTHONPATH:+:$PYTHONPATH}"
case $out in /*) export PYTHONPATH="$out/site" ;; esac

capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
case $capability in 90) architecture=90a ;; *) architecture=$capability ;; esac
PYTHON=$python ARCHITECTURES=$architecture csrc/compile.sh "$out"
library=$out/neglog_cuda.so

status=0
timeout 180 "$python" bench/device.py check --library "$library" || status=1
if command -v compute-sanitizer >/dev/null 2>&1; then
    for tool in memcheck racecheck; do
        timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" bench/device.py check --small --library "$library" >"$out/$tool.log" 2>&1 || status=1
        echo "$tool: $(tail -n 1 "$out/$tool.log")"
    done
else
    echo "compute-sanitizer: not on this machine"
fi
timeout 150 "$python" bench/device.py time --library "$library" --json "$out/device.json" || status=1
exit $status
