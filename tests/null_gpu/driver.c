// A CUDA driver without a card: what Triton's launcher calls. Kernels are compiled for real, loaded as nothing and
// counted when they are launched.

#include <stdlib.h>

#include "null_gpu.h"

long null_triton_launches;

#define SUCCEEDS(name) \
  int name(void) { return 0; }
#define LAUNCHES(name)      \
  int name(void) {          \
    null_triton_launches++; \
    return 0;               \
  }
#define HANDLE(name)        \
  int name(void** handle) { \
    *handle = (void*)1;     \
    return 0;               \
  }
#define ANSWERS(name, number) \
  int name(int* value) {      \
    *value = number;          \
    return 0;                 \
  }

SUCCEEDS(cuCtxGetDevice)
SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuCtxPopCurrent_v2)
SUCCEEDS(cuCtxPushCurrent_v2)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuCtxSynchronize)
SUCCEEDS(cuDevicePrimaryCtxRelease)
SUCCEEDS(cuDevicePrimaryCtxRelease_v2)
SUCCEEDS(cuDevicePrimaryCtxRetain)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuInit)
SUCCEEDS(cuLinkAddData_v2)
SUCCEEDS(cuLinkComplete)
SUCCEEDS(cuLinkCreate_v2)
SUCCEEDS(cuMemcpyDtoHAsync_v2)
SUCCEEDS(cuMemsetD8Async)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuStreamSynchronize)
SUCCEEDS(cuTensorMapEncodeTiled)
LAUNCHES(cuLaunchCooperativeKernel)
LAUNCHES(cuLaunchKernel)
LAUNCHES(cuLaunchKernelEx)
HANDLE(cuCtxGetCurrent)
HANDLE(cuModuleGetFunction)
HANDLE(cuModuleLoad)
HANDLE(cuModuleLoadData)
HANDLE(cuModuleLoadDataEx)
ANSWERS(cuDeviceGet, 0)
ANSWERS(cuDeviceGetCount, 1)
ANSWERS(cuOccupancyMaxActiveBlocksPerMultiprocessor, 4)
ANSWERS(cuOccupancyMaxActiveClusters, 4)

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {  // CU_DEVICE_ATTRIBUTE_...
    case 8:
      *value = 49152;
      break;  // shared memory of a block
    case 10:
      *value = 32;
      break;  // threads of a warp
    case 12:
    case 82:
      *value = 65536;
      break;  // registers of a block, of a multiprocessor
    case 16:
      *value = 82;
      break;  // multiprocessors
    case 75:
      *value = null_major;
      break;
    case 76:
      *value = null_minor;
      break;
    case 97:
      *value = 101376;
      break;  // shared memory of a block that asks for more
    default:
      *value = 1000;
  }
  return 0;
}

int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return 0;
}

int cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0;  // threads of a block, registers of a thread
  return 0;
}

int cuGetErrorString(int error, const char** text) {
  *text = "an error of the null GPU";
  return 0;
}

int cuPointerGetAttribute(void* data, int attribute, unsigned long long pointer) {
  *(unsigned long long*)data = pointer;
  return 0;
}
