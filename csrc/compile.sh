#!/bin/sh
# Compile and link the CUDA kernels for every architecture they are written for, into one library.
#
#   csrc/compile.sh [--strict] [--if-available] [OUTDIR]      OUTDIR defaults to build/cuda
#
# Needs nvcc 12.8 or later (13.0 is what CI has) and torch's headers, those of a CPU torch too: the
# stable ABI asks for no CUDA build. --if-available: say so and succeed where nvcc is missing.
# --strict: fail on a register spill or an array in local memory, on any warning of the host compiler,
# and on a library that would not load.
# PYTHON, NVCC and ARCHITECTURES may be set from outside.
set -eu

if_available=no
strict=no
warnings=-Wall
while :; do
    case ${1:-} in
        --if-available) if_available=yes ;;
        --strict) strict=yes; warnings=-Wall,-Werror ;;
        *) break ;;
    esac
    shift
done
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/../build/cuda}
python=${PYTHON:-python}
nvcc=${NVCC:-nvcc}
architectures=${ARCHITECTURES:-"80 90a 100"}

if ! command -v "$nvcc" >/dev/null 2>&1; then
    echo "csrc/compile.sh: nvcc not found: the CUDA kernels were not compiled"
    [ "$if_available" = yes ] && exit 0
    exit 1
fi

mkdir -p "$out"
includes=$("$python" -c 'from torch.utils.cpp_extension import include_paths as p; print(" ".join("-isystem " + x for x in p()))')
libraries=$("$python" -c 'from torch.utils.cpp_extension import library_paths as p; print(" ".join("-L" + x for x in p()))')
targets=
for architecture in $architectures; do
    targets="$targets -gencode arch=compute_$architecture,code=sm_$architecture"
done

# USE_CUDA shows the stable ABI's CUDA half; the version is the oldest torch the binary serves, 2.10.
jobs=
for source in "$here"/*/*.cu; do
    name=$(basename "$(dirname "$source")").$(basename "$source" .cu) # nll.row of nll/row.cu
    # shellcheck disable=SC2086
    "$nvcc" -std=c++20 -O3 $targets --threads 0 \
        -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000 \
        -Xcompiler -fPIC,-fvisibility=hidden,$warnings -Xptxas -v \
        -I "$here" $includes -c "$source" -o "$out/$name.o" >"$out/$name.log" 2>&1 &
    jobs="$jobs $!:$name"
done
objects=
logs=
for job in $jobs; do
    name=${job#*:}
    wait "${job%%:*}" || {
        grep -v "^ptxas info" "$out/$name.log" >&2
        exit 1
    }
    # An array that is indexed at run time lies in local memory as spilled registers do.
    if grep -E "[1-9][0-9]* bytes (spill|stack)" "$out/$name.log"; then
        echo "csrc/compile.sh: registers spill, or arrays do (above); the whole log is $out/$name.log" >&2
        [ "$strict" = no ] || exit 1
    fi
    objects="$objects $out/$name.o"
    logs="$logs $out/$name.log"
done
# The library finds torch's CUDA symbols through libtorch.so when it is loaded into a CUDA build of
# torch. libtorch.so defines none itself: without --no-as-needed the linker would drop it, and the
# library would not load.
# shellcheck disable=SC2086
"$nvcc" -shared -Xlinker --no-as-needed $objects -o "$out/neglog_cuda.so" \
    $libraries -ltorch -ltorch_cpu -lc10
if [ "$strict" = yes ] && command -v readelf >/dev/null 2>&1 &&
    ! readelf -d "$out/neglog_cuda.so" | grep -q 'NEEDED.*\[libtorch\.so\]'; then
    echo "csrc/compile.sh: $out/neglog_cuda.so does not ask for libtorch.so, and would not load" >&2
    exit 1
fi

# shellcheck disable=SC2086
kernels=$(cat $logs | grep -c "Compiling entry function" || true)
echo "csrc/compile.sh: $kernels kernels for sm_${architectures}, linked: $out/neglog_cuda.so"
