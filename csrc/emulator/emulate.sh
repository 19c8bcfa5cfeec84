#!/bin/sh
# Compile the CUDA sources for the CPU, as the ops of the namespace neglog_emulated: see
# cuda_on_cpu.hpp.
#
#   csrc/emulator/emulate.sh OUTDIR      needs g++ and torch's headers; neither CUDA nor a GPU
#
# PYTHON and CXX may be set from outside.
set -eu

csrc=$(cd "$(dirname "$0")/.." && pwd)
out=$1
python=${PYTHON:-python}

mkdir -p "$out"
includes=$("$python" -c 'from torch.utils.cpp_extension import include_paths as p; print(" ".join("-isystem " + x for x in p()))')
libraries=$("$python" -c 'from torch.utils.cpp_extension import library_paths as p; print(" ".join("-L" + x for x in p()))')
objects=
jobs=
for source in "$csrc"/*/*.cu; do
    object=$out/$(basename "$(dirname "$source")").$(basename "$source" .cu).o # nll.row.o of nll/row.cu
    # shellcheck disable=SC2086
    ${CXX:-g++} -std=c++20 -O2 -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Werror \
        -Wno-unknown-pragmas -DNEGLOG_EMULATED -DTORCH_TARGET_VERSION=0x020a000000000000 \
        -I "$csrc" $includes -x c++ -c "$source" -o "$object" &
    jobs="$jobs $!"
    objects="$objects $object"
done
for job in $jobs; do wait "$job"; done
# shellcheck disable=SC2086
${CXX:-g++} -shared $objects -o "$out/neglog_emulated.so" $libraries -ltorch -ltorch_cpu -lc10
