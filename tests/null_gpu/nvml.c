// NVML without a card: free and total memory of the whole device, as the null runtime has them.

#include <string.h>

#include "null_gpu.h"

#define SUCCEEDS(name) \
  int name(void) { return 0; }
#define UNSUPPORTED(name) \
  int name(void) { return 3; }

SUCCEEDS(nvmlInit_v2)
SUCCEEDS(nvmlInitWithFlags)
SUCCEEDS(nvmlShutdown)
UNSUPPORTED(nvmlDeviceGetGpuFabricInfoV)
UNSUPPORTED(nvmlDeviceGetNvLinkRemoteDeviceType)
UNSUPPORTED(nvmlDeviceGetNvLinkRemotePciInfo_v2)
UNSUPPORTED(nvmlDeviceGetP2PStatus)

const char* nvmlErrorString(int error) { return "an error of the null GPU"; }

int nvmlDeviceGetHandleByUUID(const char* uuid, void** handle) {
  *handle = (void*)1;
  return strncmp(uuid, "GPU-", 4) ? 2 : 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** handle) {
  *handle = (void*)1;
  return 0;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char* id, void** handle) {
  *handle = (void*)1;
  return 0;
}
int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = 1;
  return 0;
}
int nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = 13000;
  return 0;
}
int nvmlDeviceGetComputeRunningProcesses(void* handle, unsigned* count, void* processes) {
  *count = 0;
  return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void* handle, unsigned* count, void* processes) {
  *count = 0;
  return 0;
}

typedef struct {
  unsigned long long total, free, used;
} Memory;

int nvmlDeviceGetMemoryInfo(void* handle, Memory* memory) {
  memory->total = null_total;
  memory->free = null_free();
  memory->used = memory->total - memory->free;
  return 0;
}
