#!/usr/bin/env bash
# Out-of-bounds and misaligned accesses of our kernels: compute-sanitizer's memcheck over small ragged shapes.
#
#   bash scripts/sanitize.sh
#
# Needs a GPU and the CUDA toolkit's compute-sanitizer; under a minute. One line a kernel; the exit status is 1
# if any access or value was wrong. RLKV_PYTHON: the Python (default: python). RLKV_LOG: where the report goes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in -h | --help) sed -n '2,7s/^# \{0,1\}//p' scripts/sanitize.sh && exit ;; esac
export PATH=$PATH:/usr/local/cuda/bin
command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer: it comes with the CUDA toolkit" >&2; exit 2; }

log=${RLKV_LOG:-$(mktemp)}
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # else tensors are parts of large blocks, and none has an end
compute-sanitizer --tool memcheck --padding 4096 --report-api-errors no --destroy-on-device-error kernel \
    --target-processes application-only --print-limit 1000 --error-exitcode 9 \
    "${RLKV_PYTHON:-python}" scripts/sanitize_kernels.py >"$log" 2>&1
status=$?

awk '
    /^kernel: / { name = substr($0, 9); names[++count] = name; value[name] = "value: none" }
    /^value: /  { value[name] = $0 }
    /^========= +(Invalid|Misaligned|Out-of-range|Out-of-bounds|Warp)/ { errors[name]++ }
    END { for (i = 1; i <= count; i++) printf "%-32s %d bad accesses, %s\n", names[i], errors[names[i]], value[names[i]] }
' "$log"
if [ $status -ne 0 ] || ! grep -q "ERROR SUMMARY: 0 errors" "$log"; then
    grep -v "^value\|^kernel" "$log" | head -40
    echo "memcheck failed (status $status); the whole report: $log"
    exit 1
fi
echo "memcheck: no error"
