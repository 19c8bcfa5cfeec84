#!/bin/sh
# One call on a bare GPU machine with Python, torch (CUDA), pytest, nvcc and a C++ compiler, under 9
# minutes: install with the kernels for this GPU, check each loss once, run the tests of the CUDA ops
# on it, measure, run compute-sanitizer over small shapes. Table and goals come last; $OUT
# (build/device by default) gets device.json and the logs. What an earlier step leaves of the 9
# minutes the later ones have.
#
# SITE: a folder where neglog is installed already, with the kernels for this GPU; nothing is built.
# LIMIT: seconds to share out, in place of 525.
#
# The same tests run on the CPU, emulated: python -m pytest tests/csrc
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-build/device}
mkdir -p "$out"
out=$(cd "$out" && pwd)
started=$(date +%s)
left() {
    echo $((started + ${LIMIT:-525} - $(date +%s)))
}
at_least() { # a timeout of 0 would be none
    [ "$1" -gt "$2" ] && echo "$1" || echo "$2"
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv
"$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
case $capability in 90) architecture=90a ;; *) architecture=$capability ;; esac

# Outside $OUT, all of which is sent back. Without the CPU's compiled kernels: Numba's or torch's functions take their place.
site=${SITE:-$(mktemp -d)}
export PATH="$PATH:/usr/local/cuda/bin"
install() {
    NEGLOG_COMPILE=0 NEGLOG_CUDA=1 ARCHITECTURES=$architecture "$python" -m pip install --quiet \
        --no-build-isolation --no-deps --target "$site" . >"$out/install.log" 2>&1
}
[ -n "${SITE:-}" ] || install || { "$python" -m pip install --quiet 'setuptools>=77' 'cython>=3.1' && install; } || {
    tail -n 40 "$out/install.log"
    exit 1
}
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" # behind it, other libraries to measure
"$python" -m neglog info
"$python" -c 'from neglog import dispatch; state = dispatch.state("cuda"); assert state.usable, state.why'
# Where a loss is wrong no time is worth taking.
timeout -k 5 120 "$python" -m neglog.bench.smoke >"$out/smoke.log" 2>&1 || {
    tail -n 40 "$out/smoke.log"
    exit 1
}

status=0
seconds=$(at_least $(($(left) - 200)) 60)
[ "$seconds" -lt 180 ] || seconds=180
parallel=$("$python" -c 'import xdist; print("-n 8")' 2>/dev/null || true)
# shellcheck disable=SC2086
timeout -k 5 "$seconds" "$python" -m pytest -o addopts= -q -ra --durations=10 --maxfail=25 \
    $parallel tests/csrc -k "not emulated" >"$out/tests.log" 2>&1 || status=1
tail -n 30 "$out/tests.log"

# The sanitizers have 100 s and the benchmark the rest, 240 s at most. Past its seconds it begins
# nothing; what it is then at has 20 s.
seconds=$(at_least $(($(left) - 120)) 60)
[ "$seconds" -lt 240 ] || seconds=240
timeout -k 5 $((seconds + 20)) "$python" -m neglog.bench.device --seconds "$seconds" \
    --json "$out/device.json" >"$out/bench.log" 2>&1 || status=1
if command -v compute-sanitizer >/dev/null 2>&1; then
    tools=3
    for tool in memcheck racecheck synccheck; do
        share=$(($(left) / tools))
        tools=$((tools - 1))
        timeout -k 5 "$(at_least "$share" 10)" \
            compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" -m neglog.bench.smoke --small \
            >"$out/$tool.log" 2>&1 || grep -q "Device not supported" "$out/$tool.log" || status=1
        echo "$tool: $(grep -m 1 "Device not supported" "$out/$tool.log" || tail -n 1 "$out/$tool.log")"
    done
else
    echo "compute-sanitizer: not on this machine"
fi
tail -n 100 "$out/bench.log" # table and goals, or what stopped it
exit $status
