#!/bin/sh
# One call on a bare GPU machine with Python, torch (CUDA), pytest, nvcc and a C++ compiler, under 9
# minutes: install with the kernels for this GPU, run the tests of the CUDA ops on it, run
# compute-sanitizer over small shapes, measure. The table comes last; $OUT (build/device by default)
# gets device.json and the logs.
#
# Not yet run on a GPU. The same tests run on the CPU, emulated: python -m pytest tests/test_cuda.py
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-build/device}
mkdir -p "$out"
out=$(cd "$out" && pwd)

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv
"$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
case $capability in 90) architecture=90a ;; *) architecture=$capability ;; esac

# Outside $OUT, all of which is sent back. Without the CPU's compiled kernels, whose twins do.
site=$(mktemp -d)
install() {
    NEGLOG_COMPILE=0 NEGLOG_CUDA=1 ARCHITECTURES=$architecture "$python" -m pip install --quiet \
        --no-build-isolation --no-deps --target "$site" . >"$out/install.log" 2>&1
}
install || { "$python" -m pip install --quiet 'setuptools>=77' 'cython>=3.1' && install; } || {
    tail -n 40 "$out/install.log"
    exit 1
}
export PYTHONPATH="$site"
"$python" -m neglog info
"$python" -c 'from neglog import cuda; state = cuda.state(); assert state.usable, state.why'

status=0
parallel=$("$python" -c 'import xdist; print("-n 4")' 2>/dev/null || true)
# shellcheck disable=SC2086
timeout -k 5 180 "$python" -m pytest -q $parallel tests/test_cuda.py tests/test_gpu.py \
    -k "not emulated" >"$out/tests.log" 2>&1 || status=1
tail -n 30 "$out/tests.log"
timeout -k 5 140 "$python" bench/device.py --json "$out/device.json" >"$out/bench.log" 2>&1 || status=1
if command -v compute-sanitizer >/dev/null 2>&1; then
    for tool in memcheck racecheck; do
        timeout -k 5 70 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
            "$python" -m pytest -q -x tests/test_cuda.py -p no:cacheprovider \
            -k "not emulated and (in_place or writes_within or bits) and (float32 or bfloat16) and not eight" \
            >"$out/$tool.log" 2>&1 || grep -q "Device not supported" "$out/$tool.log" || status=1
        echo "$tool: $(grep -m 1 "Device not supported" "$out/$tool.log" || tail -n 1 "$out/$tool.log")"
    done
else
    echo "compute-sanitizer: not on this machine"
fi
tail -n 60 "$out/bench.log" # the table, or what stopped it
exit $status
